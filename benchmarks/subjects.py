"""The subjects of `speed.py`, each in its own process: this project on a backend, or the PyTorch peer.

Importing this module starts no framework, since that time is one of the figures.
"""

import os
import resource
import sys
import time

import numpy as np

from Model.geometries import GEOMETRIES, parse_name

MATRIX = 2048  # rows and columns of the matrices whose product is compared with the steps
EVALUATED = 256  # images per batch in evaluation
BATCHES = 20  # number of different batches
SUBJECTS = {
    "tensorflow": ("tensorflow", {}),
    "tensorflow, no augmentation": ("tensorflow", {"augmentation": "none"}),
    "tensorflow, XLA": ("tensorflow", {"jit": True}),
    "jax": ("jax", {}),
    "tensorflow, bfloat16": ("tensorflow", {"precision": "mixed_bfloat16"}),
}
DEFAULT = tuple(SUBJECTS)[:-1]  # without bfloat16, which takes ten times as long on processors that do not support it
BEFORE = "before"
# PyTorch at its best: `channels_last`, autocast in bfloat16, and compiled, which takes minutes for the first step.
PEERS = {
    "pytorch": {},
    "pytorch, bfloat16": {"precision": "bfloat16"},
    "pytorch, compiled": {"compile": True},
    "pytorch, bfloat16, compiled": {"precision": "bfloat16", "compile": True},
}

subject = None  # the subject of this process


def begin(name, options):
    """Make the subject of this process and take its first step; return the seconds of each part."""
    global subject
    if name == BEFORE:
        import_other_checkout(options.before)
    if name in PEERS:
        subject = Peer(PEERS[name], options)
    else:
        backend, changes = SUBJECTS.get(name, ("tensorflow", {}))
        if name == BEFORE and options.before_precision:
            changes = {"precision": options.before_precision}
        subject = Ours(backend, changes, options)
    return subject.first


def import_other_checkout(folder):
    """Make this process import the packages of another checkout of the project."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("Model", "Module", "Training")]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))


def ask(what, *arguments):
    """Call a method of the subject of this process."""
    return getattr(subject, what)(*arguments)


def measure_repeatedly(act, seconds):
    """Return the seconds of each call of `act` during `seconds`, at least three; the first call is not counted."""
    act()
    spent = []
    while len(spent) < 3 or sum(spent) < seconds:
        begun = time.perf_counter()
        act()
        spent.append(time.perf_counter() - begun)
    return spent


class Subject:
    """Random images and labels, and a clock that starts before the framework is imported."""

    def __init__(self, options):
        self.clock = time.perf_counter()
        self.first = {}
        rows = GEOMETRIES[options.geometry]
        draw = np.random.default_rng(0)
        self.shape, self.classes = (rows.pixels, rows.pixels, 3), rows.classes
        self.batch_size = options.batch_size
        self.images = draw.integers(0, 256, (BATCHES * options.batch_size, *self.shape), dtype="uint8")
        self.labels = draw.integers(0, self.classes, len(self.images)).astype("int32")

    def tick(self, part):
        now = time.perf_counter()
        self.first[part], self.clock = now - self.clock, now

    def memory(self):
        """Return the largest resident memory of this process so far, in MB."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def import_parts():
    """Return `compile_model`, `Batches`, `Examples`, `mean_subtraction`, which are elsewhere in earlier checkouts."""
    try:
        from Model.preprocessing import mean_subtraction
        from Training.data.batches import Batches
        from Training.data.datasets import Examples
        from Training.engine.fit import compile_model
    except ImportError:
        from Training.batches import Batches
        from Training.fit import compiled as compile_model
        from Training.preprocessing import mean_subtraction

        from Training.data import Examples
    return compile_model, Batches, Examples, mean_subtraction


def import_feed():
    """Return `feed`, or the identity for earlier checkouts, which do not have it."""
    try:
        from Training.engine.feeding import feed
    except ImportError:
        return lambda batches: batches
    return feed


class Ours(Subject):
    """The project's training model, trained with Keras' `fit` as in a run."""

    def __init__(self, backend, changes, options):
        super().__init__(options)
        os.environ["KERAS_BACKEND"] = backend
        from Training.console import start_keras

        start_keras()
        import keras

        from Model import network
        from Training.recipe import Recipe

        self.tick("import")
        self.dtype = "bfloat16" if changes.get("precision") == "mixed_bfloat16" else "float32"
        keras.config.set_dtype_policy(changes.get("precision", "float32"))
        compile_model, self.make_batches, self.make_examples, mean_subtraction = import_parts()
        self.feed = import_feed()
        mean = mean_subtraction(np.full(self.shape, 120.0, "float32"))
        self.network = network(options.network, geometry=options.geometry, preprocessing=mean)
        self.model = compile_model(self.network, Recipe(batch_size=self.batch_size, **changes), BATCHES)
        self.batches = self.make_batches(self.make_examples(self.images, self.labels), self.batch_size, 0)
        self.tick("build")
        busy = time.thread_time()
        self.first["first step"] = self.time_steps(2)[0]  # the second still warms up
        self.first["main thread"] = time.thread_time() - busy

    def time_steps(self, count):
        """Return the seconds of `count` steps of `fit`, each from the end of the one before or the start."""
        import keras

        ends = [time.perf_counter()]

        class Clock(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                float(logs["loss"])  # wait for the device
                ends.append(time.perf_counter())

        epochs, rest = divmod(count, BATCHES)
        for steps in [BATCHES] * epochs + [rest] * (rest > 0):
            batches = self.feed(self.batches)
            self.model.fit(batches, steps_per_epoch=steps, shuffle=False, verbose=0, callbacks=[Clock()])
        return np.diff(ends).tolist()

    def steps(self, seconds):
        """Return the seconds of the median step, without the first step of a `fit`."""
        pace = self.time_steps(3)[-1]
        count = min(max(round(seconds / pace), 3), BATCHES)
        return float(np.median(self.time_steps(count + 1)[1:]))

    def matrix(self, seconds):
        """Measure GFLOP/s of a matrix product in the precision of the step: two operations per multiply-add."""
        import keras

        operand = keras.ops.ones((MATRIX, MATRIX), self.dtype)
        spent = measure_repeatedly(
            lambda: np.asarray(keras.ops.cast(keras.ops.matmul(operand, operand)[0, 0], "float32")), seconds
        )
        return 2 * MATRIX**3 / float(np.median(spent)) / 1e9

    def augmentation(self, kind, seconds):
        """Measure the seconds of the compiled augmentation of a batch whose images are on the device."""
        import keras

        from Training.engine.augmentation import RandomAffine, RandomCrop

        layer = {"affine": RandomAffine, "crop": RandomCrop}[kind]()
        model = keras.Sequential([keras.Input(self.shape, dtype="uint8"), layer])
        batch = keras.ops.convert_to_tensor(self.images[: self.batch_size])
        if keras.backend.backend() == "jax":
            import jax

            state = [v.value for v in model.non_trainable_variables]
            compiled = jax.jit(lambda s, x: model.stateless_call([], s, x, training=True))
            return float(np.median(measure_repeatedly(lambda: jax.block_until_ready(compiled(state, batch)), seconds)))
        import tensorflow as tf

        compiled = tf.function(lambda x: model(x, training=True), jit_compile=self.model.jit_compile)
        return float(np.median(measure_repeatedly(lambda: compiled(batch)[0, 0, 0, 0].numpy(), seconds)))

    def pipeline(self, seconds):
        """Measure the seconds of a batch in the host's input pipeline."""
        return (
            float(np.median(measure_repeatedly(lambda: [self.batches[i] for i in range(BATCHES)], seconds))) / BATCHES
        )

    def evaluation(self, seconds):
        """Measure images/s of `predict`, in batches of 256."""
        batches = self.make_batches(self.make_examples(self.images, self.labels), min(EVALUATED, len(self.images)))
        spent = measure_repeatedly(lambda: self.model.predict(self.feed(batches), verbose=0), seconds)
        return len(self.images) / float(np.median(spent))

    def latency(self, seconds):
        """Measure the seconds of the prediction of one image, from bytes to probabilities."""
        image = self.images[:1]
        return float(np.median(measure_repeatedly(lambda: self.network.predict_on_batch(image), seconds)))

    def environment(self):
        from Model.count import count
        from Training.runs import environment

        return {**environment.describe_environment(), "multiply_adds": count(self.network)["multiply_adds"]}


class Peer(Subject):
    """The PyTorch network of `peer.py` in a plain training loop, in the fastest memory layout for CPUs."""

    def __init__(self, changes, options):
        super().__init__(options)
        import torch

        from benchmarks import peer

        self.tick("import")
        torch.manual_seed(0)
        _, depth = parse_name(options.network)
        mean = np.full(self.shape, 120.0, "float32")
        self.model = peer.Network(depth, options.geometry, self.classes, self.shape[0], mean)
        self.model = self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
        self.dtype = getattr(torch, changes.get("precision", "float32"))
        self.run = torch.compile(self.model) if changes.get("compile") else self.model
        self.batch = self.to_layout(self.images[: self.batch_size])
        self.target = torch.tensor(self.labels[: self.batch_size]).long()
        self.tick("build")
        busy = time.thread_time()
        self.step()
        self.tick("first step")
        self.first["main thread"] = time.thread_time() - busy

    def to_layout(self, images):
        """Return images `(batch, 3, height, width)` in the layout `channels_last`."""
        import torch

        return torch.tensor(images).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)

    def forward(self, images):
        import torch

        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.run(images)

    def step(self):
        from torch.nn.functional import cross_entropy

        self.optimizer.zero_grad()
        loss = cross_entropy(self.forward(self.batch).float(), self.target)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def steps(self, seconds):
        """Measure the seconds of the median step."""
        self.model.train()
        return float(np.median(measure_repeatedly(self.step, seconds)))

    def matrix(self, seconds):
        """Measure GFLOP/s of a matrix product in the precision of the step: two operations per multiply-add."""
        import torch

        operand = torch.ones(MATRIX, MATRIX, dtype=self.dtype)
        return 2 * MATRIX**3 / float(np.median(measure_repeatedly(lambda: operand @ operand, seconds))) / 1e9

    def evaluation(self, seconds):
        """Measure images/s in batches of 256."""
        import torch

        self.model.eval()
        images = self.to_layout(self.images)
        with torch.no_grad():
            spent = measure_repeatedly(lambda: [self.forward(part) for part in images.split(EVALUATED)], seconds)
        return len(images) / float(np.median(spent))

    def latency(self, seconds):
        """Measure the seconds of the prediction of one image."""
        import torch

        self.model.eval()
        image = self.batch[:1]
        with torch.no_grad():
            return float(
                np.median(measure_repeatedly(lambda: self.forward(image).float().softmax(-1).numpy(), seconds))
            )


def check_same_network(options):
    """Compare the network with its peer, see `peer.check`."""
    os.environ["KERAS_BACKEND"] = "tensorflow"
    from Training.console import start_keras

    start_keras()
    from benchmarks import peer
    from Model import network
    from Model.preprocessing import mean_subtraction

    rows = GEOMETRIES[options.geometry]
    mean = np.full((rows.pixels, rows.pixels, 3), 120.0, "float32")
    ours = network(options.network, geometry=options.geometry, preprocessing=mean_subtraction(mean))
    theirs = peer.Network(parse_name(options.network)[1], options.geometry, rows.classes, rows.pixels, mean)
    images = np.random.default_rng(0).integers(0, 256, (4, *mean.shape), dtype="uint8")
    return peer.check(ours, theirs, images)
