"""TensorBoard's event files, written through the `tensorboard` package alone."""

import json
import time

from Training.visual import inspection
from Training.visual.plots import encode_png

COMPARED = ("dataset", "learning", "learning_rate", "model", "optimizer")  # the HPARAMS page shows five at first


class EventFile:
    """An event file in a folder of its own (TensorBoard follows one file a folder), through `tensorboard` alone."""

    def __init__(self, folder):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.writer = EventFileWriter(str(folder))

    def add(self, summary, step=0):
        from tensorboard.compat.proto import event_pb2

        self.writer.add_event(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def graph(self, network):
        """The layers of a network, as TensorBoard's GRAPHS page draws them."""
        from tensorboard.compat.proto import event_pb2

        self.writer.add_event(event_pb2.Event(wall_time=time.time(), graph_def=_graph(network).SerializeToString()))

    def histogram(self, tag, values, step):
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb

        self.add(histogram_pb(tag, values), step)

    def scalar(self, tag, value, step):
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        self.add(scalar_pb(tag, float(value)), step)

    def image(self, tag, picture, step):
        """A uint8 picture `(height, width, 3)`."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        height, width, _ = picture.shape
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encode_png(picture))
        self.add(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def text(self, tag, text):
        from tensorboard.plugins.text.summary_v2 import text_pb

        self.add(text_pb(tag, text))

    def hparams(self, values, metrics, name):
        """A row of the HPARAMS page, the scalars with the tags `metrics` beside it."""
        from tensorboard.plugins.hparams import plugin_data_pb2, summary_v2

        config = summary_v2.hparams_config_pb(
            hparams=[summary_v2.HParam(key) for key in values],
            metrics=[summary_v2.Metric(tag) for tag in metrics],
        )
        data = config.value[0].metadata.plugin_data
        content = plugin_data_pb2.HParamsPluginData.FromString(data.content)
        for info in content.experiment.hparam_infos:
            info.differs = info.name in COMPARED
        data.content = content.SerializeToString()
        self.add(config)
        self.add(summary_v2.hparams_pb(values, trial_id=name))

    def close(self):
        self.writer.close()


def _graph(network):
    """A GraphDef of the layers, an attention block as the branches that it is made of."""
    from tensorboard.compat.proto.graph_pb2 import GraphDef
    from tensorboard.plugins.graph.keras_util import keras_model_to_graph_def

    attention = {block.name for block in inspection.find_blocks(network)}
    parts = {"before": "", "trunk": "before", "mask": "before", "multiply": "trunk mask", "after": "multiply"}
    config = json.loads(network.to_json())
    for layer in config["config"]["layers"]:
        layer["config"].pop("dtype", None)  # of a policy of two types TensorBoard complains, and does not show it
    graph = GraphDef()
    for node in keras_model_to_graph_def(config).node:
        name = node.name.split("/")[-1]
        sources = [source.split("/")[-1] for source in node.input]
        sources = [f"{source}/after" if source in attention else source for source in sources]
        operation = type(network.get_layer(name)).__name__
        if name not in attention:
            graph.node.add(name=name, op=operation, input=sources)
            continue
        for part, inside in parts.items():
            graph.node.add(name=f"{name}/{part}", op=part, input=[f"{name}/{i}" for i in inside.split()] or sources)
    return graph
