"""Check what users and files may write: refused when a config is made, or shown as plain text."""

import dataclasses
import html
import io
import random
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import mistune
import pytest
from PIL import Image
from test_config import full

from dreambooth_lib.core.config import TrainConfig, origin
from dreambooth_lib.core.config_types import ConfigError
from dreambooth_lib.core.subject import Subject
from dreambooth_lib.data.images import DataError
from dreambooth_lib.data.subjects import load_subject
from dreambooth_lib.evaluation import demo, scores, tables
from dreambooth_lib.figures import contact_sheet, image_grids, labels, plots

SUBJECT = '\n[subject]\nphotos = "photos"\nclass_noun = "dog"\n'


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "dog.toml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("steps = 3 # \xe9".encode("latin-1"), "is not UTF-8"),
        ("[" * 5000, "is not valid TOML"),
        ("x = " + "[" * 5000, "far too long; shorten it"),
        ("seed = " + "9" * 5000 + SUBJECT, "far too long"),
        ("seed = 0x" + "f" * 6000 + SUBJECT, "seed has more than 18 digits"),
        (f"learning_rate = {9**400}{SUBJECT}", "learning_rate has more than 18 digits"),
        (f"steps = 2_000_000_000{SUBJECT}", "steps is 2000000000; it must be at most"),
        (f"steps = 2020-01-01{SUBJECT}", "steps is datetime.date.*a whole number"),
        (f"base = ['toybox']{SUBJECT}", r"base is \['toybox'\].*must be text"),
        (f"base = 3{SUBJECT}", "base is 3.*must be text"),
        (f"base = ''{SUBJECT}", "base is empty"),
        (f"base = '{'x' * 300}'{SUBJECT}", "300 bytes, longer than file systems allow"),
        (f'scorer = "a\\u0000b"{SUBJECT}', r"scorer has the character U\+0000"),
        (f"class_folder = true{SUBJECT}", "class_folder is True.*must be text"),
        ("[subject]\nphotos = 4\nclass_noun = 'dog'", "subject.photos is 4.*must be text"),
        ('[subject]\nphotos = "a\\u0000"\nclass_noun = "dog"', r"subject.photos has .*U\+0000"),
        ("[[subject]]\nphotos = 'p'", "no .subject. table"),
        ("[steps]\n" + SUBJECT, "steps is {}.*a whole number"),
        (f"prior_weight = nan{SUBJECT}", "prior_weight is nan.*finite"),
        (b"x = 1\n" * 2**18, "larger than any config"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_a_config_file_that_cannot_be_right_is_named_with_its_field(
    content: str | bytes, said: str, tmp_path: Path
) -> None:
    file = write(tmp_path, content)
    with pytest.raises(ConfigError, match=said) as raised:
        TrainConfig.from_toml(file)
    assert str(raised.value).startswith(str(file)) and len(str(raised.value)) < 1000


def test_a_config_that_is_a_folder_or_has_an_impossible_name_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(ConfigError, match="cannot be read"):
            TrainConfig.from_toml(path)


def test_a_config_that_windows_editors_wrote_is_read(tmp_path: Path) -> None:
    file = write(tmp_path, b"\xef\xbb\xbf" + f"steps = 7{SUBJECT}".replace("\n", "\r\n").encode())
    assert TrainConfig.from_toml(file).steps == 7


@pytest.mark.filterwarnings("ignore")  # of the photos
def test_a_tilde_is_the_home_folder(
    tmp_path: Path, photos: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "base").mkdir(parents=True)
    file = write(tmp_path, "base = '~/base'" + SUBJECT.replace('"photos"', '"~/photos"'))
    config = TrainConfig.from_toml(file)
    assert config.subject.photos == str(tmp_path / "home" / "photos")
    assert config.base == str(tmp_path / "home" / "base")
    assert Subject("~/photos", "dog").photos == config.subject.photos
    shutil.copytree(photos, tmp_path / "home" / "photos")
    assert load_subject("~/photos", "dog") == config.subject
    assert Subject("~nobody-of-that-name/photos", "dog").name == "photos"


def test_a_run_that_is_its_own_base_is_refused(tmp_path: Path) -> None:
    for name, base in (("one", "."), ("two", "../three"), ("three", "../two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text(f"base = '{base}'{SUBJECT}")
    for name in ("one", "two"):
        with pytest.raises(ConfigError, match=r"config\.toml: base is a run that was trained from"):
            TrainConfig(Subject("photos", "dog"), str(tmp_path / name))
        with pytest.raises(ConfigError, match="trained from this one"):
            TrainConfig.from_toml(tmp_path / name / "config.toml")
    (tmp_path / "one" / "config.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"one/config\.toml is not UTF-8"):
        origin(str(tmp_path / "one"))


@pytest.mark.parametrize("field", ["class_noun", "identifier", "name", "kind"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("back\npack", r"contains the invisible character U\+000A; retype it without it\."),
        ("dog\x1b[31m", r"U\+001B"),
        ("dog\0", r"U\+0000"),
        ("dog\ud800", "."),
        ("dog\u202egod", r"U\+202E"),
        ("\u2028", "is empty"),
        (" \t", "is empty"),
        ("d" * 300, "."),
        (3, "is 3; it must be text"),
    ],
)
def test_words_that_nobody_could_mean_are_refused(field: str, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^subject\.{field} .*{said}"):
        dataclasses.replace(Subject("photos", "dog"), **{field: text})


@pytest.mark.parametrize("name", ["../../x", "a/b", "a\\b", ".", "..", "CON", "nul.txt", "/etc"])
def test_a_name_that_cannot_be_a_folders_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^subject\.name is '.*; give"):
        Subject("photos", "dog", name=name)


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("photos/rex", "rex"),
        ("photos/my dog, é", "my dog, é"),
        ("photos/a\nb", "a_b"),
        ("photos/CON", "_CON"),
        (f"photos/{'é' * 127}", "é" * 100),
        ("/", "subject"),
    ],
)
def test_a_name_that_comes_from_the_photos_folder_is_made_fit(folder: str, name: str) -> None:
    assert Subject(folder, "dog").name == name


def test_a_config_in_python_is_checked_like_a_file(tmp_path: Path) -> None:
    config = TrainConfig(Subject(tmp_path, "dog"), tmp_path, prior_weight=2)  # type: ignore[arg-type]
    assert config.base == config.subject.photos == str(tmp_path)
    assert type(config.prior_weight) is float
    for changes in ({"steps": "many"}, {"flip": 1}, {"resolution": 2**15}, {"crop": ["center"]}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            config.replace(**changes)


def test_a_mutated_config_is_a_config_or_a_sentence(tmp_path: Path) -> None:
    whole, rng = full().to_toml().encode(), random.Random(0)
    odd = [b"nan", b"-1", b"1e400", b"9" * 30, b"true", b"[]", b"{}", b"07:32:00", b'"\\0"',
           b'"\\u202e"', b'"~"', b'"."', b'"' + b"x/" * 3000 + b'"', b"'toybox'"]  # fmt: skip
    for _ in range(150):
        lines = whole.split(b"\n")
        place = rng.randrange(len(lines))
        lines[place] = lines[place].partition(b"=")[0] + b"=" + rng.choice(odd)
        data = bytearray(b"\n".join(lines) if rng.random() < 0.7 else whole)
        if rng.random() < 0.3:
            data[rng.randrange(len(data))] = rng.randrange(256)
        file = write(tmp_path, bytes(data))
        try:
            TrainConfig.from_toml(file).to_toml().encode()
        except ConfigError as error:
            assert str(error).startswith(str(file)) and str(error).isprintable()


#: Texts that PIL's layout or matplotlib's formulas would refuse or change.
ODD = [
    "a\nb",
    "$x^2$",
    "$\\frac{",
    "cost $5 or $6",
    "a\x00b",
    "\ud800",
    "\u202eabc",
    "日本 🐕",
    "_x",
    "",
]


@pytest.mark.parametrize("text", ODD)
def test_figures_show_any_text(text: str) -> None:
    image = Image.new("RGB", (8, 8))
    image_grids.grid([image], 1, [text])
    image_grids.matrix([text], [text], [[[image]]], title=text)
    contact_sheet.contact_sheet(
        None, title=text, photos=[image], rows=[(text, [image], [image])], class_before=[image],
        class_after=[image], class_prompt=text,
    )  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"base": text, text or "scorer": other, "score": 0.5, "prior_drift": 0.1,
         "subject_fidelity": 0.2}
        for other in (text, None)
    ]  # fmt: skip
    for figure in (plots.heat_map(rows, text or "scorer", "base"), plots.front(rows, "base")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of letters that the font lacks
            figure.savefig(io.BytesIO())
        shown = [label.get_text() for axes in figure.axes for label in axes.get_yticklabels()]
        assert not any("\n" in label for label in shown)


@pytest.mark.parametrize("text", ["a | b", "a\nb", "<b>x</b>", "[x](http://x.y)", "*x*", "`x`"])
def test_tables_show_words_as_text(text: str) -> None:
    mean = scores.Mean(text, text, "subject_fidelity", 0.5, 0.4, 0.6, 3)
    row = {"name": text, "prior_weight": 1.0, "reference_fidelity": 0.8}
    measured = {"subject_fidelity": 0.5, "prompt_adherence": 0.5, "class_diversity": 0.5,
                "prior_drift": 0.1}  # fmt: skip
    for table in (
        tables.markdown([mean]),
        demo.summary([row | {"base": measured, "tuned": measured}]),
    ):
        shown = str(mistune.create_markdown(escape=False, plugins=["table", "url"])(table))
        assert html.escape(" ".join(text.split())) in shown
        assert shown.count("<tr>") == 2 and not re.search("<(b|a|em|code)[ >]", shown)
        cells = shown.count("<td") + shown.count("<th") - shown.count("<thead")
        assert cells == 2 * table.splitlines()[1].count("-|" if "|---|" in table else "--- |")
    page = labels.html_table([text], [(True, text, [text])])
    assert "<b>x" not in page and page.count(html.escape(text)) == 3


def test_scores_that_were_damaged_are_named_with_their_row(tmp_path: Path) -> None:
    row = scores.Row("base", "rex", "live", "clip", "pres", None, None, 0.5)
    file = tmp_path / "scores.csv"
    for damage in ("base,rex,live,clip,pres,,,half\n", "base\n", "a,b,c,d,e,f,g,1,2,3\n", "\0,\n"):
        tables.write_csv([row], file)
        with file.open("a") as lines:
            lines.write(damage)
        with pytest.raises(DataError, match=r"scores.csv has no scores after its row 1"):
            tables.read_csv(file)
    file.write_bytes(b"method\xff\n")
    with pytest.raises(DataError, match=r"scores\.csv has no scores after its row 0"):
        tables.read_csv(file)
