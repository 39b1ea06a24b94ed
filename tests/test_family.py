"""Compares networks with published counts, with independent arithmetic and with a second implementation."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from Model import Geometry, Stage, network, residual_attention_network
from Model.__main__ import main
from Model.count import count
from Model.geometries import ATTENTION, FAMILIES, GEOMETRIES, LEARNING, TITLES, format_name, parse_name
from Module import AttentionBlock
from tests.support import arithmetic, independent
from tests.support.backend import JIT
from tests.support.shapes import shapes_only

ROOT = Path(__file__).parent.parent


def count_network(name, **kwargs):
    with shapes_only():
        return count(network(name, **kwargs))


def test_authors_graph_has_the_published_counts():
    """Compare with the counts in the authors' prototxt files."""
    counts = count_network("attention_56", geometry="imagenet")
    assert counts["kernels"] == 29_689_024 + 2048 * 1000
    assert counts["trainable"] == 31_810_728
    assert counts["parameters"] == 31_883_432
    assert counts["multiply_adds"] == 6_270_836_736


@pytest.mark.parametrize(
    "depth, weights, millions",
    [
        (56, 1_015_482, 122.8),
        (92, 1_814_202, 212),
        (128, 2_612_922, 301),
        (164, 3_411_642, 390),
        (236, 5_009_082, 568),
        (452, 8_612_538, None),
    ],
)
def test_paper_s_cifar_networks_have_the_published_counts(depth, weights, millions):
    counts = count_network(f"attention_{depth}", geometry="paper")
    assert counts["kernels"] + 10 == weights  # the published counts include the biases of the classifier
    assert counts["trunk_depth"] == depth
    if millions:
        assert counts["multiply_adds"] / 1e6 == pytest.approx(millions, abs=0.5)
    if depth == 92:
        hundred = count_network("attention_92", geometry="paper", classes=100)
        assert hundred["kernels"] + 100 == weights + 23_130


@pytest.mark.parametrize(
    "geometry, name",
    [
        ("compact", "attention_56"),
        ("compact", "attention_92"),
        ("compact", "attentionnext_56"),
        ("full", "attention_92"),
        ("paper", "attentionnext_56"),
        ("paper", "attentioninception_56"),
        ("imagenet", "attention_92"),
        ("imagenet", "attentionnext_92"),
        ("imagenet", "attentioninception_56"),
    ],
)
def test_counts_equal_independent_arithmetic(geometry, name):
    assert count_network(name, geometry=geometry) == arithmetic.count(name, geometry)


def test_inception_costs_as_much_as_the_residual_network():
    for geometry in GEOMETRIES:
        ours, theirs = (arithmetic.count(f"{family}_56", geometry) for family in ("attentioninception", "attention"))
        for key in ("parameters", "multiply_adds"):
            assert ours[key] == pytest.approx(theirs[key], rel=0.03)


@pytest.mark.parametrize(
    "geometry, name",
    [
        ("compact", "attention_56"),
        ("paper", "attention_56"),
        ("paper", "attentionnext_56"),
        ("imagenet", "attention_56"),
        ("imagenet", "attentioninception_56"),
    ],
)
def test_local_masks_cost_as_much_as_encoder_decoder_masks(geometry, name):
    local = count_network(name, geometry=geometry, mask="local")
    assert local["multiply_adds"] == pytest.approx(arithmetic.count(name, geometry)["multiply_adds"], rel=0.005)
    assert local["trunk_depth"] == 56


# The names of the second implementation, mapped to our layers.


def place_norm(norm, values, name):
    norm.set_weights([values[f"{name}/{part}"] for part in ("gamma", "beta", "mean", "variance")])


def place_unit(unit, values, name):
    norms = [unit.activate[0]] + [part for part in unit.branch if isinstance(part, keras.layers.BatchNormalization)]
    for i, norm in enumerate(norms, start=1):
        place_norm(norm, values, f"{name}/bn{i}")
    kernels = [part for part in unit.branch if isinstance(part, keras.layers.Conv2D)]
    for i, convolution in enumerate(kernels, start=1):
        convolution.kernel.assign(values[f"{name}/conv{i}"])
    for projection in unit.projection:
        projection.kernel.assign(values[f"{name}/project"])


def place_block(block, values, name):
    groups = {"before": block.before, "trunk": block.trunk, "after": block.after}
    for part, units in groups.items():
        for i, unit in enumerate(units, start=1):
            place_unit(unit, values, f"{name}/{part}{i}")
    for level, units in enumerate(block.down_sample, start=1):
        for i, unit in enumerate(units, start=1):
            place_unit(unit, values, f"{name}/down{level}/unit{i}")
    for level, (skip, units) in enumerate(zip(reversed(block.skip), reversed(block.up_sample)), start=1):
        place_unit(skip, values, f"{name}/skip{level}")
        for i, unit in enumerate(units, start=1):
            place_unit(unit, values, f"{name}/up{level}/unit{i}")
    norm_1, _, first, norm_2, _, second = block.weigh
    place_norm(norm_1, values, f"{name}/mask/bn1")
    place_norm(norm_2, values, f"{name}/mask/bn2")
    first.kernel.assign(values[f"{name}/mask/conv1"])
    second.kernel.assign(values[f"{name}/mask/conv2"])


def place(model, values):
    """Copy all weights of the second implementation into the network."""
    for layer in model.layers:
        if match := re.fullmatch(r"stage_(\d)_attention_(\d)", layer.name):
            place_block(layer, values, f"stage{match[1]}/block{match[2]}")
        elif match := re.fullmatch(r"stage_(\d)_unit", layer.name):
            place_unit(layer, values, f"stage{match[1]}/unit")
        elif match := re.fullmatch(r"tail_unit_(\d)", layer.name):
            place_unit(layer, values, f"tail/unit{match[1]}")
    model.get_layer("stem_convolve").kernel.assign(values["stem/conv"])
    place_norm(model.get_layer("norm_stem"), values, "stem/bn")
    place_norm(model.get_layer("norm_tail"), values, "tail/bn")
    model.get_layer("logits").set_weights([values["classifier/kernel"], values["classifier/bias"]])
    assert sum(w.size for w in values.values()) == model.count_params()


@pytest.fixture(scope="module")
def values():
    return independent.draw_weights((1, 1, 1), classes=1000, seed=0)


@pytest.fixture(scope="module")
def build_placed(values):
    """A function that returns Attention-56 with these values; networks of one size share their layers."""

    @functools.cache
    def get_placed(size):
        model = network("attention_56", geometry="imagenet", input_shape=(size, size, 3))
        place(model, values)
        return model

    def build(size, **choices):
        model = get_placed(size)
        with shapes_only():
            wanted = network("attention_56", geometry="imagenet", input_shape=(size, size, 3), **choices)
        for layer in model.layers:
            if isinstance(layer, AttentionBlock):
                layer.learning, layer.attention = choices["learning"], choices["attention"]
        assert [layer.get_config() for layer in model.layers] == [layer.get_config() for layer in wanted.layers]
        return model

    return build


CASES = [(64, learning, attention) for learning in LEARNING for attention in ATTENTION]
CASES += [(96, "nal", "spatial"), (224, "arl", "mixed")]


@pytest.mark.parametrize("size, learning, attention", CASES)
def test_logits_equal_the_second_implementation_s(values, build_placed, size, learning, attention):
    model = build_placed(size, learning=learning, attention=attention)
    images = np.random.default_rng(size).normal(size=(1, size, size, 3)).astype("float32")
    logits = keras.Model(model.input, model.get_layer("logits").output)
    ours = keras.ops.convert_to_numpy(logits(images))
    theirs = independent.forward(images, values, learning=learning, attention=attention)
    assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)


@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("attention", ATTENTION)
def test_block_and_mask_equal_the_second_implementation_s(learning, attention):
    """With naive channel attention, the logits hardly depend on the blocks, so blocks are compared separately."""
    shapes = independent.list_block_shapes("block", 16, 2, 2, 1, 3)
    values = independent.draw_values(shapes, seed=1)
    block = AttentionBlock(16, mask_depth=2, p=2, t=1, r=3, learning=learning, attention=attention)
    images = np.random.default_rng(0).normal(size=(2, 14, 10, 16)).astype("float32")
    block(images)
    place_block(block, values, "block")
    ours = [keras.ops.convert_to_numpy(each) for each in block(images, return_mask=True)]
    theirs = independent.block(images, values, "block", 2, learning, attention, p=2, t=1, r=3)
    for a, b in zip(ours, theirs):
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b)


@pytest.mark.parametrize(
    "unit, attention, mask",
    [
        pytest.param("resnext", "spatial", "local", marks=pytest.mark.backends),
        ("inception", "channel", "encoder_decoder"),
    ],
)
def test_variants_save_load_and_learn(unit, attention, mask, tmp_path):
    geometry = Geometry(64, 7, (Stage(64, 2, 1, closing=1),), ((64, 2),), 2, True, 3, pixels=32)
    model = residual_attention_network(geometry=geometry, unit=unit, attention=attention, mask=mask)
    images = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype("float32")
    model.compile(keras.optimizers.SGD(0.01), "sparse_categorical_crossentropy", jit_compile=JIT)
    labels = np.arange(8) % 10
    first, last = (model.fit(images, labels, epochs=8, verbose=0).history["loss"][i] for i in (0, -1))
    assert np.isfinite(last) and last < first
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(images), model(images))


def test_any_image_size_that_the_masks_allow():
    for size in (64, 80, 97, 225):
        with shapes_only():
            model = network("attention_56", geometry="imagenet", input_shape=(size, size, 3))
        assert model.output_shape == (None, 1000)
    with pytest.raises(ValueError, match="mask_depth=3 needs a map of at least 8 pixels, received 4x4"):
        network("attention_56", geometry="imagenet", input_shape=(16, 16, 3))


def test_names():
    assert parse_name("attentionnext_92") == ("resnext", 92)
    for name in ("attention", "attention_", "attention_-56", "resnet_50", "attention_56 "):
        with pytest.raises(ValueError, match="received"):
            parse_name(name)


def test_names_in_tables_are_those_of_the_paper():
    names = ("attention_92", "attentionnext_56", "attentioninception_56", "final_attention")
    assert [format_name(name) for name in names] == [
        "Attention-92",
        "AttentionNeXt-56",
        "AttentionInception-56",
        "final_attention",
    ]
    assert TITLES.keys() == FAMILIES.keys()


def test_command_counts_as_json_and_refuses_in_one_line(capsys, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "")  # as if it were not set
    main(["attention_92", "--geometry", "paper", "--json"])
    assert json.loads(capsys.readouterr().out) == arithmetic.count("attention_92", "paper")
    main(["attention_56"])
    assert "stage_3_attention_1      AttentionBlock       4x4x512" in capsys.readouterr().out
    for arguments, said in (
        (["attention_57"], "depth must be 36 m + 20"),
        (["attention_56", "--size", "0"], "--size must be from 1 to 10,000, received 0"),
        (["attention_56", "--size", "1000000"], "--size must be from 1 to 10,000, received 1000000"),
        (["attention_56", "--classes", "-3"], "--classes must be from 1 to 1,000,000, received -3"),
        (["attention_56", "--geometry", "huge"], "invalid choice: 'huge'"),
        (["attention_56", "--geometry", "imagenet", "--size", "8"], "needs a map of at least"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == "" and err.count("\n") == 1 and said in err


@pytest.mark.parametrize(
    "name, said", [("foo", "the name of a network must be one of"), ("attention_56", "KERAS_BACKEND must be one")]
)
def test_command_prints_one_line_if_no_backend_starts(name, said):
    arguments = [sys.executable, "-m", "Model", name]
    run = subprocess.run(
        arguments, cwd=ROOT, env={**os.environ, "KERAS_BACKEND": "foo"}, capture_output=True, text=True
    )
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1 and said in run.stderr


def test_table_of_networks_has_the_counts():
    text = (ROOT / "docs" / "networks.md").read_text()
    rows = re.findall(r"^\| (attention\w*_\d+) \| (\w+) \| ([\d,]+(?: \| [\d,]+){4}) \|$", text, re.M)
    assert len(rows) >= 12
    for name, geometry, figures in rows:
        shown = [int(figure.replace(",", "")) for figure in figures.split(" | ")]
        assert shown == list(arithmetic.count(name, geometry).values()), f"{name} {geometry}"
