"""Lines of metrics as TensorBoard sees them."""

import pytest

from abyssal.train.run.tensorboard import TensorBoard, scalars

RECORD = {"step": 3, "lm": 2.5, "load_max": [1.5, None], "grad_by": {"attn": 0.25}, "text": "no number"}


def test_every_number_has_a_tag_of_its_own():
    assert dict(scalars(RECORD)) == {"lm": 2.5, "load_max/0": 1.5, "grad_by/attn": 0.25}


def test_a_full_disk_is_told_once(tmp_path):
    pytest.importorskip("tensorboard")

    class Full:
        def add_scalar(self, *_):
            raise OSError(28, "No space left on device")

    board = TensorBoard(tmp_path)
    board.close()
    board.writer = Full()
    with pytest.warns(UserWarning, match=r"No space left on device; metrics\.jsonl has it all") as told:
        board.write(RECORD)
        board.write(RECORD)
        board.close()
    assert len(told) == 1


def test_event_files_hold_the_numbers_and_a_resumed_run_hides_what_it_repeats(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    for step in range(1, 6):
        board.write({"step": step, "lm": float(step)})
    board.close()
    board = TensorBoard(tmp_path, step=3)
    board.write({"step": 4, "lm": 40.0})
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("lm")] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
