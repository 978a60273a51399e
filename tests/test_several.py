"""Several subjects in one run: in turn, each with its own prior, and what bleeds between them."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import save_photos

from dreambooth_lib import families, metrics, runs, watch
from dreambooth_lib.config import ConfigError, Subject, TrainConfig
from dreambooth_lib.data import alternating, in_turn, shuffled
from dreambooth_lib.pictures import Photo
from dreambooth_lib.runs import Run, RunError
from dreambooth_lib.sampling import sample
from dreambooth_lib.state import load_state
from dreambooth_lib.training import Trainer, train
from dreambooth_lib.watch import View, apart, history, look_at_all

Make = Callable[..., TrainConfig]


@pytest.fixture
def cat(tmp_path: Path) -> Subject:
    save_photos(tmp_path / "cats", 5)
    return Subject(str(tmp_path / "cats"), "cat", "hta")


@pytest.fixture
def started(tiny_sd1: str, photos: str, make_config: Make, cat: Subject, tmp_path: Path,
            clip_folder: Path) -> Callable[..., Run]:  # fmt: skip
    def start(name: str, base: str = tiny_sd1, **changes: Any) -> Run:
        fields: dict[str, Any] = {"others": (cat,), "steps": 2, "class_pictures": 3}
        fields |= {"judge": str(clip_folder), "checkpoint_every": 1}
        return runs.start(make_config(base, photos, **(fields | changes)), tmp_path / name)

    return start


def test_several_subjects_come_back_from_toml(
    tiny_sd1: str, photos: str, make_config: Make, cat: Subject, tmp_path: Path
) -> None:
    config = make_config(tiny_sd1, photos, others=(cat,))
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert TrainConfig.from_toml(tmp_path / "config.toml") == config
    assert [subject.class_noun for subject in config.subjects] == ["dog", "cat"]
    assert config.apart == (config.replace(others=()), config.replace(subject=cat, others=()))
    text = config.to_toml().replace(cat.pictures, "cats")
    (tmp_path / "config.toml").write_text(text)
    found = TrainConfig.from_toml(tmp_path / "config.toml").others
    assert found[0].pictures == cat.pictures, "taken from the file's folder"


def test_subjects_that_could_not_be_told_apart_are_refused(
    tiny_sd1: str, photos: str, make_config: Make, cat: Subject
) -> None:
    with pytest.raises(ConfigError, match=r"identifiers are ohwx, ohwx; give each its own"):
        make_config(tiny_sd1, photos, others=(replace(cat, identifier="ohwx"),))
    with pytest.raises(ConfigError, match=r"train_token is set but there are others"):
        make_config(tiny_sd1, photos, others=(cat,), method="lora", train_token=True)
    with pytest.raises(ConfigError, match=r"class_folder .* of 2 \(cat, dog\); leave it out"):
        make_config(tiny_sd1, photos, others=(cat,), class_folder=photos)
    fields = make_config(tiny_sd1, photos).to_dict()
    with pytest.raises(ConfigError, match=r"others is not a list of tables"):
        TrainConfig.from_dict(fields | {"others": "cats"})


def test_groups_take_turns_and_each_is_gone_through() -> None:
    rows = in_turn([2, 3], 7, 0, 24)
    assert all((row < 2) == (i % 2 == 0) for i, row in enumerate(rows))
    assert set(Counter(rows[::2]).values()) == {6} and set(Counter(rows[1::2]).values()) == {4}
    assert rows[10:14] == in_turn([2, 3], 7, 10, 4), "it depends on nothing that came before"
    assert in_turn([5], 7, 3, 9) == shuffled(5, 7, 3, 9), "one group is as ever"


def test_photos_alternate() -> None:
    names = [[Photo(n, None) for n in group] for group in ("ab", "c", "")]  # type: ignore[arg-type]
    assert [photo.name for photo in alternating(names)] == ["a", "c", "b"]


def test_an_update_has_both_subjects_and_the_class_of_each(started: Callable[..., Run]) -> None:
    batch = Trainer(started("run", batch_size=4, prompt_dropout=0.0)).batches.at(0)
    assert batch.prompts == ["a ohwx dog", "a hta cat"] * 2 + ["a dog", "a cat"] * 2
    assert batch.is_prior.tolist() == [False] * 4 + [True] * 4
    trainer = Trainer(started("one", batch_size=1, prompt_dropout=0.0))
    prompts = [trainer.batches.at(step).prompts for step in range(3)]
    assert prompts == [["a ohwx dog", "a dog"], ["a hta cat", "a cat"], ["a ohwx dog", "a dog"]]
    sets = list((trainer.run.folder.parent / "class_pictures").iterdir())
    assert len(sets) == 2, "a set a class"


def test_subjects_of_one_class_share_its_pictures(
    started: Callable[..., Run], cat: Subject
) -> None:
    run = started("run", others=(replace(cat, class_noun="dog"),))
    trainer = Trainer(run)
    assert len(list((run.folder.parent / "class_pictures").iterdir())) == 1
    assert trainer.batches.at(0).prompts[-1] == "a dog"


@pytest.mark.parametrize(
    "changes",
    [{}, {"method": "lora", "prior": "distilled"}, {"memory": "low", "prior": "none"}],
    ids=["full", "lora-distilled", "low"],
)
def test_a_run_of_several_resumes_bit_for_bit_and_draws_both(
    changes: dict[str, Any], started: Callable[..., Run]
) -> None:
    whole, broken = (started(name, watch_every=1, **changes) for name in ("whole", "broken"))
    list(train(whole))
    for _ in islice(train(broken), 1):
        pass
    list(train(runs.resume(broken.folder)))
    one, other = (load_state(run.checkpoints()[2])["model"] for run in (whole, broken))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert sample(whole, ["a {} dog beside a hta cat"], [0], steps=1)
    with pytest.raises(RunError, match="whose others is"):
        runs.begin(whole.config.replace(others=()), whole.folder)


def test_a_look_tells_the_subjects_and_what_bled_between_them(
    started: Callable[..., Run], tmp_path: Path
) -> None:
    run = started("run", watch_every=2)
    list(train(run))
    found = history(run)[-1]
    assert set(found.fidelity) == set(found.bleeding) == {"ohwx dog", "hta cat"}
    assert found.subject_fidelity == pytest.approx(np.mean(list(found.fidelity.values())))
    seen = watch.drawn(run, 2)
    assert len(seen.subject) == 2 * len(watch.PROMPTS) and len(seen.unrelated) == 1
    assert seen.prompts[0] == "a ohwx dog on the beach"
    assert seen.prompts[-1] == "a hta cat in space"
    encoder = watch.judge(run.config)
    dogs, cats = (encoder.images(one.subject).numpy() for one in apart(seen, 2))
    of = [encoder.images([p.image for p in watch_photos(s)]).numpy() for s in run.config.subjects]

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
        return float((a @ b.T).mean())

    expected = cosine(dogs, of[1]) - cosine(of[0], of[1])
    assert found.bleeding["ohwx dog"] == pytest.approx(expected, abs=1e-4)
    expected = cosine(cats, of[0]) - cosine(of[1], of[0])
    assert found.bleeding["hta cat"] == pytest.approx(expected, abs=1e-4)


def watch_photos(subject: Subject) -> list[Photo]:
    from dreambooth_lib.pictures import read_pictures

    return read_pictures(subject.pictures)


def test_looks_are_put_together_and_taken_apart(tiny_sd1: str, photos: str, cat: Subject) -> None:
    family, view = families.load_model(tiny_sd1), View(class_pictures=2, inference_steps=1)
    subjects = [Subject(photos, "dog"), cat]
    seen = look_at_all(family, subjects, view)
    for one, subject in zip(apart(seen, 2), subjects, strict=True):
        alone = watch.look(family, subject, view)
        assert one.prompts == alone.prompts
        for mine, own in ((one.subject, alone.subject), (one.of_class, alone.of_class)):
            pairs = [
                (np.asarray(a, int), np.asarray(b, int)) for a, b in zip(mine, own, strict=True)
            ]
            assert all(np.abs(a - b).max() <= 1 for a, b in pairs)


def test_what_two_subjects_have_in_common_is_no_bleeding() -> None:
    generator = torch.Generator().manual_seed(0)
    own, other = (torch.randn(5, 8, generator=generator) for _ in range(2))
    assert metrics.bleeding(own, own, other) == pytest.approx(0, abs=1e-9)
    assert metrics.bleeding(other, own, other) > 0


def test_only_what_was_asked_is_known_where_text_encoders_are_let_go_of(
    started: Callable[..., Run],
) -> None:
    trainer = Trainer(started("run", memory="low", watch_every=1))
    assert trainer.family.known is not None
    assert {"a hta cat", "a cat", "a hta cat in space"} <= trainer.family.known.row.keys()
