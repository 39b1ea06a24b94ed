"""TensorBoard's event files and projector, written with the `tensorboard` package, without TensorFlow."""

import importlib.util
import io
import itertools
import json
import os
import re
import socket
import time
from pathlib import Path

import numpy as np

from Model.builder import FEATURES
from Training.files import replace_file
from Training.visual import inspection
from Training.visual.plots import encode_png, make_sprite

COMPARED = ("dataset", "learning", "learning_rate", "model", "optimizer")  # default columns of the HPARAMS page
THRESHOLDS = 127  # of a precision-recall curve, evenly spaced from 0 to 1
# Charts of the CUSTOM SCALARS page, with the tags whose training and validation curves each of them shows.
CHARTS = (
    ("loss", ("epoch_loss",)),
    ("error, %", ("epoch_error_percent",)),
    ("learning rate", ("epoch_learning_rate",)),
    ("images a second", ("epoch_images_per_second",)),
)


def is_available():
    """Return whether event files can be written: whether the `tensorboard` package is installed."""
    return importlib.util.find_spec("tensorboard") is not None


class EventFile:
    """An event file in a folder. TensorBoard follows one event file per folder.

    The package's own writer works in a thread, and through TensorFlow if that is installed: a full disk is then
    reported late, and as an error that is not an `OSError`.

    Args:
        folder: path of the folder, which is created if it does not exist.
        clock: function that returns the time of an event in seconds since 1970, or None for `time.time`.
    """

    def __init__(self, folder, clock=None):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        Path(folder).mkdir(exist_ok=True)
        self.clock = clock or time.time
        self.file = _open_new(Path(folder))
        self.records = RecordWriter(self.file)
        self._write(event_pb2.Event(wall_time=self.clock(), file_version="brain.Event:2"))
        self.flush()

    def _write(self, event):
        self.records.write(event.SerializeToString())

    def add(self, summary, step=0):
        """Write a `Summary` protocol buffer."""
        from tensorboard.compat.proto import event_pb2

        self._write(event_pb2.Event(wall_time=self.clock(), step=step, summary=summary))

    def flush(self):
        """Pass buffered events to the operating system, so that TensorBoard can read them."""
        self.file.flush()

    def add_tensor(self, tag, values, metadata, step=0):
        """Write an array, or an array of one byte string, with the metadata of the plugin that shows it."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.util.tensor_util import make_tensor_proto

        value = Summary.Value(tag=tag, metadata=metadata, tensor=make_tensor_proto(values))
        self.add(Summary(value=[value]), step)

    def graph(self, network):
        """Write the layers of a network as a graph for the GRAPHS page."""
        from tensorboard.compat.proto import event_pb2

        self._write(event_pb2.Event(wall_time=self.clock(), graph_def=_graph(network).SerializeToString()))

    def histogram(self, tag, values, step):
        """Write the distribution of an array's values."""
        from tensorboard.plugins.histogram.summary_v2 import histogram_pb

        self.add(histogram_pb(tag, values), step)

    def scalar(self, tag, value, step):
        """Write a number."""
        from tensorboard.plugins.scalar.summary_v2 import scalar_pb

        self.add(scalar_pb(tag, float(value)), step)

    def image(self, tag, picture, step):
        """Write a uint8 picture `(height, width, 3)`."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        height, width, _ = picture.shape
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encode_png(picture))
        self.add(Summary(value=[Summary.Value(tag=tag, image=image)]), step)

    def text(self, tag, text, step=0):
        """Write a text in Markdown."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        self.add(text_pb(tag, text), step)

    def layout(self):
        """Write the layout of the CUSTOM SCALARS page, see `CHARTS`."""
        from tensorboard.plugins.custom_scalar import layout_pb2, metadata

        charts = [
            layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=[f"^{tag}$" for tag in tags]))
            for title, tags in CHARTS
        ]
        layout = layout_pb2.Layout(category=[layout_pb2.Category(title="training and validation", chart=charts)])
        content = np.array(layout.SerializeToString(), dtype=object)
        self.add_tensor(metadata.CONFIG_SUMMARY_TAG, content, metadata.create_summary_metadata())

    def pr_curve(self, tag, labels, probabilities, step):
        """Write the precision-recall curve of one class.

        Args:
            tag: str, the name of the class.
            labels: bool `(n,)`, whether an image belongs to the class.
            probabilities: `(n,)`, of the class.
            step: int, the epoch.
        """
        from tensorboard.plugins.pr_curve import metadata

        about = metadata.create_summary_metadata(display_name=tag, description="", num_thresholds=THRESHOLDS)
        self.add_tensor(f"{tag}/pr_curves", count_at_thresholds(labels, probabilities, THRESHOLDS), about, step)

    def hparams(self, values, metrics, name):
        """Write a row of the HPARAMS page, with the scalars whose tags are `metrics`."""
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
        """Flush and close the file."""
        self.file.close()


class EventFiles(dict):
    """Event files of a run by part, "train" and "validation", created on first use.

    Otherwise TensorBoard would list parts without events.

    Args:
        folder: path of the run's folder.
        clock: see `EventFile`.
    """

    def __init__(self, folder, clock=None):
        super().__init__()
        self.folder = Path(folder)
        self.clock = clock or time.time

    def __missing__(self, part):
        self[part] = EventFile(self.folder / part, self.clock)
        return self[part]


def _open_new(folder):
    """Create a file under the next free name in TensorBoard's format; existing files and links are never opened."""
    start = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
    for number in itertools.count():
        try:
            return open(folder / f"{start}.{number}", "xb")
        except FileExistsError:
            continue


def count_at_thresholds(labels, probabilities, thresholds):
    """Return true and false positives, true and false negatives, precision and recall at each threshold.

    An image counts as positive if its probability is at least the threshold.

    Args:
        labels: bool `(n,)`.
        probabilities: `(n,)` in [0, 1].
        thresholds: int, number of thresholds, evenly spaced from 0 to 1.

    Returns:
        float32 `(6, thresholds)`.
    """
    places = np.linspace(0, 1, thresholds)

    def count_above(values):
        return len(values) - np.searchsorted(np.sort(values), places, side="left")

    true, false = count_above(probabilities[labels]), count_above(probabilities[~labels])
    missed, rejected = labels.sum() - true, (~labels).sum() - false
    precision, recall = true / np.maximum(true + false, 1), true / max(labels.sum(), 1)
    return np.stack([true, false, rejected, missed, precision, recall]).astype("float32")


def write_projector(folder, name, features, columns, images):
    """Write points, their labels and thumbnails for the PROJECTOR page of the run in `folder`.

    Args:
        folder: path of a folder with event files.
        name: str, the name of the points.
        features: `(n, channels)`.
        columns: `{title: [text, ...]}`, labels of each point, without tabs or line breaks.
        images: uint8 `(n, height, width, 3)`.
    """
    from google.protobuf import text_format
    from tensorboard.plugins.projector.metadata import PROJECTOR_FILENAME
    from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

    place, thumbnail = Path(folder) / "projector", 32
    place.mkdir(exist_ok=True)
    values = io.BytesIO()
    np.savetxt(values, features, fmt="%.6g", delimiter="\t")
    replace_file(place / "features.tsv", values.getvalue())
    rows = ["\t".join(columns), *map("\t".join, zip(*columns.values()))]
    replace_file(place / "labels.tsv", ("\n".join(rows) + "\n").encode())
    replace_file(place / "thumbnails.png", encode_png(make_sprite(images, thumbnail)))
    config = ProjectorConfig()
    points = config.embeddings.add(
        tensor_name=name,
        tensor_shape=features.shape,
        tensor_path="projector/features.tsv",
        metadata_path="projector/labels.tsv",
    )
    points.sprite.image_path = "projector/thumbnails.png"
    points.sprite.single_image_dim.extend([thumbnail, thumbnail])
    replace_file(Path(folder) / PROJECTOR_FILENAME, text_format.MessageToString(config).encode())


def _graph(network):
    """Return a GraphDef of the layers in groups, in which attention blocks are split into their branches."""
    from tensorboard.compat.proto.graph_pb2 import GraphDef
    from tensorboard.plugins.graph.keras_util import keras_model_to_graph_def

    attention = {block.name for block in inspection.find_blocks(network)}
    parts = {"before": "", "trunk": "before", "mask": "before", "multiply": "trunk mask", "after": "multiply"}
    config = json.loads(network.to_json())
    for layer in config["config"]["layers"]:
        layer["config"].pop("dtype", None)  # TensorBoard warns about policies with two types, and shows none
    paths, graph = group_layers([layer.name for layer in network.layers]), GraphDef()
    for node in keras_model_to_graph_def(config).node:
        name = node.name.split("/")[-1]
        path, layer = paths[name], network.get_layer(name)
        sources = [source.split("/")[-1] for source in node.input]
        sources = [f"{paths[source]}/after" if source in attention else paths[source] for source in sources]
        if name not in attention:
            graph.node.add(name=path, op=type(layer).__name__, input=sources)
            continue
        for part, inside in parts.items():
            graph.node.add(name=f"{path}/{part}", op=part, input=[f"{path}/{i}" for i in inside.split()] or sources)
    return graph


def group_layers(names):
    """Return the path of each layer in the GRAPHS page, which groups layers by the part before a slash.

    Layers between the inputs and the first stage are the stem, `stage_1_unit` is `stage_1/unit`, layers from the last
    stage to the features are the tail, and the following ones the classifier. A network without stages is not grouped.
    """
    stages = [i for i, name in enumerate(names) if re.match(r"stage_\d+_", name)]
    if not stages:
        return {name: name for name in names}
    head = names.index(FEATURES) + 1 if FEATURES in names else len(names)
    paths = {}
    for i, name in enumerate(names):
        if stages[0] <= i <= stages[-1]:
            paths[name] = re.sub(r"^(stage_\d+)_", r"\1/", name)
        else:
            group = "stem" if i < stages[0] else "tail" if i < head else "classifier"
            paths[name] = name if i == 0 else f"{group}/{name.removeprefix(group + '_')}"
    return paths
