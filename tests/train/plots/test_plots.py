"""curves.png: drawn from metrics.jsonl alone, with something on it."""

import errno
import json
import math
import os

import numpy as np
import pytest

from abyssal.train.plots.curves import plot
from abyssal.train.plots.mechanisms import plot_mechanisms
from abyssal.train.plots.style import smooth
from abyssal.train.run import metrics

matplotlib = pytest.importorskip("matplotlib")


def record(step: int, **more) -> dict:
    lm = 1.5 + 4 / step
    base = {"step": step, "tokens": 100 * step, "seconds": 0.1 * step, "loss": lm, "lm": lm, "mtp": lm + 1}
    base |= {"balance": 1.0, "index": 0.1, "lr": 1e-3, "grad_norm": 1.0, "load_max": [1.2, 1.5, 1.1]}
    base |= {"load_cv": [0.1, 0.2, 0.1], "spread": [0.1, 0.3], "captured": [0.9, None]}
    return base | {"tokens_per_second": 5000.0, "peak_memory_gib": 0.5} | more


def write(folder, records) -> None:
    folder.mkdir(exist_ok=True)
    (folder / metrics.FILE).write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")


def colours(path) -> set[tuple]:
    from matplotlib.image import imread

    image = imread(path)
    assert image.shape[0] > 400 and image.shape[1] > 600
    return {tuple(np.round(pixel, 2)) for pixel in image[::3, ::3, :3].reshape(-1, 3)}


def test_a_picture_with_curves(tmp_path):
    run = tmp_path / "run"
    write(run, [record(s, **({"held_out": 3.0, "trigram": 2.6} if s % 10 == 0 else {})) for s in range(1, 41)])
    path = plot(run)
    assert path == run / "curves.png"
    assert len(colours(path)) > 30


COMPARED = {
    "training": {"all": 9_187_203, "corpus": 9_187_203},
    "scores": [
        {"name": "model", "training": "read", "held_out": 2.0, "clean": 2.25},
        {"name": "KN-5", "training": "all", "held_out": 1.89, "clean": 2.14},
        {"name": "xz", "training": "all", "held_out": 1.737},
    ],
    "curve": [{"step": 20, "held_out": 2.6}, {"step": 40, "held_out": 2.4375}],
}


def test_opponents_are_drawn_from_their_file(tmp_path, monkeypatch):
    from abyssal.train.plots import curves

    figures = []
    monkeypatch.setattr(curves, "save", lambda figure, path, title: figures.append(figure) or path)
    write(tmp_path, [record(s, held_out=3.0, trigram=2.6, **{"clean": 3.5} if s > 2 else {}) for s in range(1, 5)])
    plot(tmp_path)
    (tmp_path / "opponents.json").write_text(json.dumps(COMPARED), "utf-8")
    plot(tmp_path)
    alone, compared = ([line.get_label() for line in figure.axes[0].lines[1:]] for figure in figures)
    assert alone[1:] == ["held-out text: 3.000 at the end", "its clean bytes alone: 3.500 at the end",
                         "trigram model, same held-out bytes: 2.600"]  # fmt: skip
    assert compared[3:] == ["5-gram model (KN) of 9.19 MB: 1.890", "xz after 9.19 MB: 1.737",
                            "5-gram model (KN) of what was read: 2.438 at the end"]  # fmt: skip
    assert figures[1].axes[0].lines[-1].get_xdata().tolist() == [20, 40]


def test_tokens_of_several_bytes_are_drawn_as_such(tmp_path, monkeypatch):
    from abyssal.train.plots import curves

    drawn = []
    monkeypatch.setattr(curves, "save", lambda figure, path, title: drawn.append((figure, title)) or path)
    write(tmp_path, [record(s, lm=4 * math.log(2)) for s in (1, 2)])
    plot(tmp_path)
    start = {"recipe": {}, "data": {"digest": "x", "contents": "y", "bytes_per_token": 2.5}}
    (tmp_path / "run.json").write_text(json.dumps({"starts": [start]}), "utf-8")
    plot(tmp_path)
    for (figure, title), bits, unit in zip(drawn, ("4.000", "1.600"), ("byte", "token")):
        assert figure.axes[0].lines[1].get_label() == f"training text: {bits} at the end"
        assert {f"next {unit}: 2.77", f"{unit} after next (MTP): 4.5"} <= {
            text.get_text() for text in figure.axes[1].get_legend().get_texts()
        }
        assert f" M {unit}s " in title


@pytest.mark.parametrize("steps", [1, 2])
def test_the_first_steps_can_be_drawn(tmp_path, steps):
    write(tmp_path, [record(s) for s in range(1, steps + 1)])
    assert len(colours(plot(tmp_path, tmp_path / "other.png"))) > 10


def test_a_model_without_some_mechanisms_can_be_drawn(tmp_path):
    bare = [record(s, captured=[], mtp=None, index=None) for s in range(1, 5)]
    write(tmp_path, [{k: v for k, v in r.items() if v is not None} for r in bare])
    assert plot(tmp_path).is_file()


def test_a_half_written_last_line_is_left_out(tmp_path):
    write(tmp_path, [record(1), record(2)])
    with open(tmp_path / metrics.FILE, "a", encoding="utf-8") as file:
        file.write('{"step": 3, "lm"')
    assert [r["step"] for r in metrics.read(tmp_path)] == [1, 2]
    plot(tmp_path)


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    write(tmp_path, [record(1)])
    plot(tmp_path, tmp_path / "a.png")

    def full(self, path, **_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.png'"):
        plot(tmp_path, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before and not list(tmp_path.glob(".*"))


def test_a_picture_without_a_kind_is_a_png_and_its_name_is_told(tmp_path):
    write(tmp_path, [record(1)])
    assert plot(tmp_path, tmp_path / "a") == tmp_path / "a.png" and (tmp_path / "a.png").is_file()
    assert plot(tmp_path, tmp_path / "b.svg").read_text("utf-8").startswith("<?xml")
    with pytest.raises(ValueError, match="empty name"):
        plot(tmp_path, "/")


def test_errors_name_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no metrics\.jsonl"):
        plot(tmp_path / "none")
    write(tmp_path, [])
    with pytest.raises(ValueError, match="no step yet"):
        plot(tmp_path)


def test_smoothing_is_a_running_mean():
    values = [math.sin(i) for i in range(230)]
    width = 230 // 50
    wanted = [np.mean(values[max(0, i - width + 1) : i + 1]) for i in range(230)]
    np.testing.assert_allclose(smooth(values), wanted, atol=1e-9)


def observed(step: int, **more) -> dict:
    measured = {"grad_by": {"attn": 0.5 / step, "experts": 0.2}, "update_by": {"attn": 1e-3, "experts": 2e-3}}
    measured |= {
        "sinkhorn": [1e-6, 2e-5],
        "gain": [1.01, 1.02],
        "recall": [0.4, None],
        "gate": [0.5],
        "collisions": [0.1],
    }
    return record(step) | measured | more


def test_mechanisms_are_drawn_where_they_were_measured(tmp_path):
    write(tmp_path, [observed(s) if s % 3 == 0 else record(s) for s in range(1, 20)])
    assert plot_mechanisms(tmp_path) == tmp_path / "mechanisms.png"
    assert len(colours(tmp_path / "mechanisms.png")) > 30


def test_mechanisms_that_a_model_does_not_have_are_left_out(tmp_path):
    bare = [{k: v for k, v in observed(s).items() if k not in ("recall", "gate", "collisions")} for s in (1, 2)]
    write(tmp_path, bare)
    assert plot_mechanisms(tmp_path, tmp_path / "m.png") == tmp_path / "m.png"


def test_a_run_that_was_not_observed_has_no_second_picture(tmp_path):
    write(tmp_path, [record(1)])
    assert plot_mechanisms(tmp_path) is None
    assert not (tmp_path / "mechanisms.png").exists()


def test_curves_of_a_run_with_rewards_show_what_its_metrics_hold():
    from matplotlib.figure import Figure

    from abyssal.train.plots import curves as plots
    from abyssal.train.plots import rewards as curves

    records = [
        {"step": s + 1, "reward": 0.5, "reward_thinking": s / 20, "reward_chat": 0.25, "kl": 0.01 * s, "entropy": 0.5}
        | {"length_thinking": 20.0, "length_chat": 5.0, "clip_fraction": 0.0, "off_policy": 0.125}
        for s in range(20)
    ]
    records[-1] |= {"accuracy": {}, "accuracy_thinking": 0.75, "accuracy_chat": 0.5}
    records[-1] |= {"flipped_experts": 0.25, "flipped_picks": 0.5}
    panels = plots._panels(records, {}, 1.0)
    assert panels == (curves.reward, curves.distance, curves.entropy, curves.length, curves.limits)
    shown = []
    for panel in panels:
        axis = Figure().subplots()
        panel(axis, records)
        shown.append([text.get_text() for text in axis.get_legend().get_texts()])
    assert shown[0][:2] == ["reward, thinking: 0.725", "reward, answer at once: 0.25"]  # the last ten steps
    assert shown[0][2:] == ["thinking: 0.750 at the end", "answer at once: 0.500 at the end"]
    assert shown[1] == ["KL to the weights at the start, or to the teacher: 0.145"] and shown[2] == ["entropy: 0.5"]
    assert shown[3] == ["thinking: 20", "answer at once: 5"]
    assert shown[4] == [
        *("tokens clipped: 0", "tokens left out as off-policy: 0.125", "experts that would be others: 0.25"),
        "entries that would be others: 0.5",
    ]
    tuning = [{"step": 1, "lm": 2.0, "accuracy": {}, "accuracy_chat": 0.5}]
    assert plots._panels(tuning, {}, 1.0)[0] is curves.accuracy
    assert plots._panels([{"step": 1, "lm": 2.0}], {}, 1.0)[0].func is plots._bits
