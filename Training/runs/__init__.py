"""What a run keeps on the disk: its folder, checkpoints, event files, networks and history."""
