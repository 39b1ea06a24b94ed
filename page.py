"""Show in the browser, on this machine only, what networks see in a picture, and their soft masks."""

import base64
import contextlib
import dataclasses
import html
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import webbrowser
from pathlib import Path
from typing import NamedTuple

import numpy as np

from predict import rank
from Training.console import entry_point, report_errors, run_program, silence_stderr, start_keras, warn
from Training.data import decoding
from Training.errors import InputError, format_path
from Training.flags import Parser

PROGRAM = "page.py"
HOST = "127.0.0.1"
PORT = 7860
SHIPPED = ("cifar10", "cifar10-nal")
TOP = 5  # classes shown
SIDE = 160  # pixels of an image under its mask, at least
LARGEST_FILE = 100 * 2**20  # bytes
# The browser itself then refuses to load anything from another host.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; frame-ancestors 'none'"
CAPTIONS = {"mask": "soft mask", "before": "before", "after": "after"}  # in the order in which they are shown
INTRODUCTION = """# Residual Attention Network
Choose or drop a picture: it is scaled to the networks' input size, and its centre is cropped. Each column is one
network, with its five most probable classes and, for one attention block, the soft mask over the picture and the
features before and after the mask. Dark colours are low and bright colours high values; the range is shown below each
map."""
CSS = """
#gallery .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) }
#message { overflow-wrap: anywhere }
.error { color: #b91c1c; font-weight: 600 }
.dark .error { color: #fca5a5 }
.maps { display: grid; grid-template-columns: repeat(3, 1fr); gap: .6em; margin-top: .3em; line-height: 1.4 }
.maps figure { margin: 0 }
.maps img { width: 100%; image-rendering: pixelated; border-radius: 4px }
.maps .colors { height: .5em; border-radius: 2px }
.maps .scale { display: flex; justify-content: space-between; font-size: .8em; font-variant-numeric: tabular-nums }
"""


@dataclasses.dataclass
class Network:
    """A network as the page shows it."""

    title: str
    classes: list[str]
    size: tuple[int, int]  # height, width
    blocks: dict[str, tuple[str, tuple]]  # of each: "arl" or "nal", and the mask's shape (h, w, channels)
    view: object  # see `inspection.make_view_model`; None outside the process that computes
    compiled: bool  # or its operations run one by one


class Look(NamedTuple):
    """The answers of one network for one picture."""

    image: np.ndarray  # uint8 (height, width, 3)
    probabilities: np.ndarray  # (classes,)
    branches: dict  # of each block: {"trunk": (h, w, channels), "mask": the same}


def parse(arguments):
    parser = Parser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--model",
        nargs="+",
        default=SHIPPED,
        metavar="NAME|RUN|FILE",
        help=f"trained weights, runs' folders or .keras files, next to each other (default: {' '.join(SHIPPED)})",
    )
    parser.add_argument("--best", action="store_true", help="the runs' best.keras instead of their last.keras")
    parser.add_argument("--port", type=int, default=PORT, help=f"port on {HOST} (default: {PORT})")
    parser.add_argument("--browser", action="store_true", help="open the page in the default browser")
    options = parser.parse_args(arguments)
    if not 1 <= options.port <= 65535:
        parser.error(f"--port must be between 1 and 65535, received {options.port}")
    return options


def import_gradio():
    """Import Gradio, with everything switched off that would send data off this machine.

    Raises:
        InputError: it is not installed.
    """
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]  # they are for other pages: GRADIO_SHARE would publish this one
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    os.environ |= {"NO_PROXY": HOST, "no_proxy": HOST}  # Gradio asks its own server whether it has started
    try:
        import gradio
    except ImportError as error:
        raise InputError(f"{error}: install requirements-page.txt") from None
    return gradio


def prepare(network, classes, title):
    """Return a loaded network as the page shows it.

    Raises:
        InputError: it has no attention blocks.
    """
    import keras

    from Training.visual import inspection

    found = inspection.find_blocks(network)
    if not found:
        raise InputError(f"{title} has no attention blocks: a network of this project is needed")
    view = inspection.make_view_model(network)
    shapes = {name: branches["mask"].shape[1:] for name, branches in view.output["branches"].items()}
    blocks = {block.name: (block.learning, shapes[block.name]) for block in found}
    learning = ", ".join(sorted({each.upper() for each, _ in blocks.values()}))
    classes = [format_path(name) for name in classes or range(network.output_shape[1])]
    whole = keras.backend.backend() == "jax"  # it would compile each operation separately, which takes longer
    return Network(f"{learning}: {title}", classes, network.input_shape[1:3], blocks, view, compiled=whole)


def load_networks(names, paths):
    """Return the networks in files, with the names that the user gave as titles.

    Raises:
        InputError: see `saved.load` and `prepare`.
    """
    from Training.runs import saved

    networks = []
    for where, path in zip(names, paths):
        network = saved.load(path)
        classes = saved.read_classes(path, network.output_shape[1])
        if classes is None:
            warn(f"{PROGRAM}: no classes.json next to {format_path(path)}: classes are numbered from 0")
        networks.append(prepare(network, classes, format_path(where)))
    return networks


def compile_network(network):
    """Compile a network with a first call. Until then its operations run one by one: slower, but without a wait."""
    network.view.predict_on_batch(np.zeros((1, *network.size, 3), "uint8"))
    network.compiled = True


def look(network, image):
    """Return the answers of a network for an image uint8 `(height, width, 3)` of its input size."""
    import keras

    seen = network.view.predict_on_batch(image[None]) if network.compiled else network.view(image[None], training=False)
    seen = keras.tree.map_structure(lambda values: np.asarray(values[0], "float32"), seen)
    return Look(image, seen["probabilities"], seen["branches"])


def look_at_file(networks, name, raw):
    """Return the answers of each network for the bytes of a picture file.

    Raises:
        InputError: they are not a readable picture.
    """
    with silence_stderr():  # libtiff writes warnings about damaged files there
        images = {size: decoding.read(name, size, raw) for size in {network.size for network in networks}}
    return [look(network, images[network.size]) for network in networks]


def draw_maps(seen, block, learning, channel, opacity):
    """Draw the mask of one block over the image, and the features before and after it.

    Args:
        seen: `Look`.
        block: str, the name of the block.
        learning: "arl" or "nal", the kind of the block.
        channel: int, counted from 1, or 0 for the mean over the channels.
        opacity: float in [0, 1], opacity of the mask over the image.

    Returns:
        `{name: (picture, lowest, highest)}`.
    """
    from Training.visual import plots

    stages = plots.apply_mask(**seen.branches[block], learning=learning)
    values = {name: each[..., channel - 1] if channel else each.mean(axis=-1) for name, each in stages.items()}
    pictures = {name: plots.color_heat(plots.rescale(each)) for name, each in values.items()}
    large = plots.enlarge(seen.image[None], -(-SIDE // len(seen.image)))[0]
    pictures["mask"] = plots.overlay(large, plots.rescale(values["mask"]), opacity)
    return {name: (pictures[name], values[name].min(), values[name].max()) for name in CAPTIONS}


def format_maps(network, seen, number, channel, opacity):
    """Return the maps of a block as HTML; `seen` is a `Look` or None, the last three are the values of the sliders."""
    from Training.visual import plots

    if number > len(network.blocks):
        return f"No block {number}: this network has {len(network.blocks)}."
    block, (learning, shape) = list(network.blocks.items())[number - 1]
    title = html.escape(f"{plots.format_block_title(block, shape)}, {shape[-1]} channels")
    if seen is None:
        return title
    colors = ", ".join(f"rgb{tuple(map(int, color))}" for color in plots.color_heat(np.linspace(0, 1, 9)))
    figures = ""
    for name, (picture, low, high) in draw_maps(seen, block, learning, min(channel, shape[-1]), opacity).items():
        source = base64.b64encode(plots.encode_png(picture)).decode()
        figures += (
            f'<figure><img alt="{CAPTIONS[name]}" src="data:image/png;base64,{source}"><figcaption>{CAPTIONS[name]}'
            f'<div class="colors" style="background: linear-gradient(to right, {colors})"></div>'
            f'<div class="scale"><span>{low:.3g}</span><span>{high:.3g}</span></div></figcaption></figure>'
        )
    return f'{title}<div class="maps">{figures}</div>'


def count_channels(networks, number):
    """Return the largest number of channels that the block with this number has in any network."""
    blocks = [list(network.blocks.values())[number - 1] for network in networks if number <= len(network.blocks)]
    return max(shape[-1] for _, shape in blocks)


def read_photographs():
    """Return example photographs as `(name, bytes of a PNG file, pixels)`."""
    from Training.data.datasets import load_photographs
    from Training.visual import plots

    names = ("temple", "its roof", "flower", "its middle")
    return [(name, plots.encode_png(pixels), pixels) for name, pixels in zip(names, load_photographs(SIDE))]


def serve_networks(connection, names, paths):
    """Load networks and answer requests through a connection; this runs in the process that computes.

    It sends `(networks, photographs, looks of the first photograph)`, and then, for each `(name, bytes)` of a picture
    file that it receives, the result of `look_at_file`. An `InputError` is sent too; while loading, it is the end.
    """
    try:
        start_keras()
        networks, photographs = load_networks(names, paths), read_photographs()
        first = look_at_file(networks, *photographs[0][:2])
        connection.send(([dataclasses.replace(each, view=None) for each in networks], photographs, first))
    except InputError as error:
        connection.send(error)
        return
    # The process waits for this thread when it ends: it would abort if TensorFlow was still compiling.
    threading.Thread(target=lambda: [compile_network(network) for network in networks]).start()
    with contextlib.suppress(EOFError, OSError):  # the other process has ended
        while True:
            name, raw = connection.recv()
            try:
                connection.send(look_at_file(networks, name, raw))
            except InputError as error:
                connection.send(error)


class NetworkProcess:
    """A process that loads networks while this one imports Gradio, and then computes their answers.

    On two cores, two processes start in two thirds of the time of one; threads would wait for each other.

    Args:
        names, paths: see `load_networks`.
    """

    def __init__(self, names, paths):
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads can hang
        self.connection, other = context.Pipe()
        self.lock = threading.Lock()
        arguments = (other, list(names), list(paths))
        self.process = context.Process(target=serve_networks, args=arguments, daemon=True)
        before = signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # inherited: Ctrl-C reaches both processes, and this one ends both
        self.process.start()
        signal.signal(signal.SIGINT, before)
        other.close()

    def receive(self):
        """Return the next object from the process.

        Raises:
            InputError: the process sent it, or has ended.
        """
        try:
            received = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise InputError(f"the process that computes has ended with code {self.process.exitcode}") from None
        if isinstance(received, InputError):
            raise received
        return received

    def ask(self, name, raw):
        """Return the answers of each network for the bytes of a picture file; see `look_at_file`."""
        with self.lock:
            with contextlib.suppress(OSError):  # `receive` reports that the process has ended
                self.connection.send((name, raw))
            return self.receive()

    def end(self):
        """End the process."""
        self.process.terminate()
        self.process.join()


class Answers:
    """What the page's components show after an event; the last arguments are always the values of the three sliders.

    Args:
        networks: list of `Network`.
        photographs: see `read_photographs`.
        first: the looks of the first photograph.
        ask: function of the name and the bytes of a picture file that returns a `Look` for each network.
    """

    def __init__(self, networks, photographs, first, ask):
        self.networks = networks
        self.photographs = photographs
        self.first = first
        self.ask = ask

    def show_maps(self, looks, *chosen):
        """Return the maps of each network, for the chosen block and channel."""
        looks = looks or [None] * len(self.networks)
        return [format_maps(network, each, *chosen) for network, each in zip(self.networks, looks)]

    def show(self, message, looks, *chosen):
        """Return the looks, a message as HTML, then the classes and the maps of each network."""
        shares = [
            dict(rank(each.probabilities, network.classes, TOP)) for network, each in zip(self.networks, looks or ())
        ]
        pairs = zip(shares or [None] * len(self.networks), self.show_maps(looks, *chosen))
        return looks, message, *(value for pair in pairs for value in pair)

    def show_first(self, *chosen):
        return self.show(self.photographs[0][0], self.first, *chosen)

    def show_photograph(self, number, *chosen):
        return self.show_picture(*self.photographs[number][:2], *chosen)

    def show_file(self, path, *chosen):
        return None, *self.show_picture(Path(path).name, Path(path).read_bytes(), *chosen)  # None: ready for the next

    def show_picture(self, name, raw, *chosen):
        try:
            return self.show(html.escape(name), self.ask(name, raw), *chosen)
        except InputError as error:
            return self.show(f'<div class="error" role="alert">{html.escape(str(error))}</div>', None, *chosen)


def make_page(gr, answers):
    """Return the page: a column of controls, and one for each network. The server computes all that they show."""
    networks, most_blocks = answers.networks, max(len(network.blocks) for network in answers.networks)
    with gr.Blocks(title="Residual Attention Network", analytics_enabled=False, delete_cache=(600, 600)) as page:
        looks = gr.State(answers.first)
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(min_width=300):
                upload = gr.File(label="Picture", height=140, elem_id="upload")
                photographs = [pixels for _, _, pixels in answers.photographs]
                gallery = gr.Gallery(photographs, show_label=False, columns=4, rows=1, height=124, allow_preview=False,
                                     interactive=False, buttons=[], elem_id="gallery")  # fmt: skip
                message = gr.HTML(elem_id="message")
                block = gr.Slider(1, max(most_blocks, 2), 1, step=1, label="Attention block", elem_id="block",
                                  visible=most_blocks > 1)  # fmt: skip
                channel = gr.Slider(
                    0, count_channels(networks, 1), 0, step=1, label="Channel (0: mean)", elem_id="channel"
                )
                opacity = gr.Slider(0, 1, 0.6, step=0.05, label="Strength of the overlay", elem_id="opacity")
            columns = []
            for i, network in enumerate(networks):
                with gr.Column(min_width=300):
                    columns += [gr.Label(label=network.title, num_top_classes=TOP, elem_id=f"classes-{i}"),
                                gr.HTML(elem_id=f"maps-{i}")]  # fmt: skip
        sliders, results = [block, channel, opacity], [looks, message, *columns]
        quiet = {"show_progress": "hidden", "api_visibility": "private"}

        def show_photograph(event: gr.SelectData, *chosen):
            return answers.show_photograph(event.index, *chosen)

        def limit_channel(number, chosen):
            most = count_channels(networks, number)
            return gr.update(maximum=most, value=min(chosen, most))

        page.load(answers.show_first, sliders, results, **quiet)
        upload.upload(answers.show_file, [upload, *sliders], [upload, *results], concurrency_id="look", **quiet)
        gallery.select(show_photograph, sliders, results, concurrency_id="look", **quiet)
        block.input(limit_channel, [block, channel], channel, **quiet)
        moved = [slider.input for slider in sliders]
        gr.on(moved, answers.show_maps, [looks, *sliders], columns[1::2], trigger_mode="always_last", **quiet)
    return page


class KeepLocal:
    """ASGI middleware that adds a header to every response: the browser must not load anything from another host."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def refuse_used_port(port):
    """Raise `InputError` if the port cannot be used. This is called before anything slow."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
    except OSError as error:
        raise InputError(f"--port {port} cannot be used: {error.strerror}; choose another") from None


def serve(page, options):
    """Serve the page until a signal ends the process.

    Raises:
        InputError: the port was taken in the meantime.
    """
    import gradio
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]), Middleware(KeepLocal)]
    try:
        page.launch(
            server_name=HOST, server_port=options.port, share=False, quiet=True, prevent_thread_lock=True,
            max_file_size=LARGEST_FILE, ssr_mode=False, mcp_server=False, footer_links=[], css=CSS,
            theme=gradio.themes.Default(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace")),
            app_kwargs={"middleware": middleware},
        )  # fmt: skip
    except OSError:
        refuse_used_port(options.port)
        raise
    address = f"http://{HOST}:{options.port}"
    print(f"{address} (only on this machine; Ctrl-C ends it)", flush=True)
    if options.browser:
        webbrowser.open(address)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # the terminal may have been closed
            warn("\nStopped.")
    finally:
        with silence_stderr():
            page.close(verbose=False)


@entry_point(PROGRAM, output_needed=False)
def main(arguments=None):
    from Training.runs import saved

    options = parse(arguments)
    with report_errors(PROGRAM, "Stopped."):
        paths = [saved.find(where, options.best) for where in options.model]
        refuse_used_port(options.port)
        with tempfile.TemporaryDirectory(prefix="page-") as folder:  # for uploads
            process = NetworkProcess(options.model, paths)
            try:
                gradio = import_gradio()
                os.environ["GRADIO_TEMP_DIR"] = folder
                answers = Answers(*process.receive(), process.ask)
                serve(make_page(gradio, answers), options)
            finally:
                process.end()


if __name__ == "__main__":
    run_program(main)
