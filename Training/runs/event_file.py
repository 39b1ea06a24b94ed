"""TensorBoard's event files, written with the `tensorboard` package, without TensorFlow."""

import itertools
import json
import os
import socket
import time
from pathlib import Path

from Training.visual import inspection
from Training.visual.plots import encode_png

COMPARED = ("dataset", "learning", "learning_rate", "model", "optimizer")  # the HPARAMS page shows five at first


class EventFile:
    """An event file in a folder, of which TensorBoard follows one file each.

    The package's own writer works in a thread, and through TensorFlow if that is installed: a full disk is then
    reported late, and as an error that is not an `OSError`.

    Args:
        folder: path of the folder, which is made if it is missing.
    """

    def __init__(self, folder):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        Path(folder).mkdir(exist_ok=True)
        self.file = _open_new(Path(folder))
        self.records = RecordWriter(self.file)
        self._write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
        self.flush()

    def _write(self, event):
        self.records.write(event.SerializeToString())

    def add(self, summary, step=0):
        from tensorboard.compat.proto import event_pb2

        self._write(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def flush(self):
        """Give what was added to the system, so that TensorBoard can read it."""
        self.file.flush()

    def graph(self, network):
        """Add the layers of a network, as TensorBoard's GRAPHS page draws them."""
        from tensorboard.compat.proto import event_pb2

        self._write(event_pb2.Event(wall_time=time.time(), graph_def=_graph(network).SerializeToString()))

    def histogram(self, tag, values, step):
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb

        self.add(histogram_pb(tag, values), step)

    def scalar(self, tag, value, step):
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        self.add(scalar_pb(tag, float(value)), step)

    def image(self, tag, picture, step):
        """Add a uint8 picture `(height, width, 3)`."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        height, width, _ = picture.shape
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encode_png(picture))
        self.add(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def text(self, tag, text):
        from tensorboard.plugins.text.summary_v2 import text_pb

        self.add(text_pb(tag, text))

    def hparams(self, values, metrics, name):
        """Add a row of the HPARAMS page, with the scalars tagged `metrics` in it."""
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
        self.file.close()


def _open_new(folder):
    """Open a new file under the next free name of TensorBoard's form; no file or link that is there is opened."""
    start = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
    for number in itertools.count():
        try:
            return open(folder / f"{start}.{number}", "xb")
        except FileExistsError:
            continue


def _graph(network):
    """Return a GraphDef of the layers, with an attention block as its branches."""
    from tensorboard.compat.proto.graph_pb2 import GraphDef
    from tensorboard.plugins.graph.keras_util import keras_model_to_graph_def

    attention = {block.name for block in inspection.find_blocks(network)}
    parts = {"before": "", "trunk": "before", "mask": "before", "multiply": "trunk mask", "after": "multiply"}
    config = json.loads(network.to_json())
    for layer in config["config"]["layers"]:
        layer["config"].pop("dtype", None)  # TensorBoard warns about policies of two types, and does not show them
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
