"""Pictures of networks and results."""
