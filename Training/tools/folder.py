"""Write a CIFAR archive as folders of PNG files: `python -m Training.tools.folder cifar10 OUT`."""

from pathlib import Path

from Training.console import entry_point, format_count, report_errors, run_program
from Training.data import archives
from Training.errors import InputError, format_path
from Training.flags import Parser


def write(images, labels, classes, folder):
    """Write images uint8 `(n, height, width, 3)` as `<folder>/<class>/<position>.png`.

    Files sorted by name keep the order of the images within a class.
    """
    from PIL import Image

    for name in classes:
        (Path(folder) / name).mkdir(parents=True, exist_ok=True)
    for i, (image, label) in enumerate(zip(images, labels)):
        Image.fromarray(image).save(Path(folder) / classes[label] / f"{i:05d}.png")


@entry_point("python -m Training.tools.folder")
def main(arguments=None):
    """Run the command line."""
    parser = Parser(
        prog="python -m Training.tools.folder", description="Write a CIFAR archive as folders of PNG files."
    )
    parser.add_argument("dataset", choices=tuple(archives.ARCHIVES))
    parser.add_argument("out", help="folder for train/<class>/ and test/<class>/, which must not exist")
    parser.add_argument("--data-dir", default="", help="folder with the official archive or its unpacked folder")
    options = parser.parse_args(arguments)
    with report_errors(parser.prog, "Stopped."):
        if Path(options.out).exists():
            raise InputError(f"{format_path(options.out)} already exists: choose another folder")
        images, labels, test_images, test_labels, classes = archives.read(options.dataset, options.data_dir)
        try:
            write(images, labels, classes, Path(options.out) / "train")
            write(test_images, test_labels, classes, Path(options.out) / "test")
        except OSError as error:
            raise InputError(f"{format_path(options.out)} cannot be written: {error.strerror or error}") from None
    print(f"{format_count(len(labels) + len(test_labels), 'picture')} in {format_path(options.out)}")


if __name__ == "__main__":
    run_program(main)
