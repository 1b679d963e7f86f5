"""Progress: the events that a run tells, and how the command line draws them."""

import io

from quant.progress import Progress, ProgressEvent
from turbomind_quant.cli.progress import PatientConsole, ShownProgress
from turbomind_quant.cli.views.durations import duration


def test_durations_are_words() -> None:
    assert [duration(s) for s in (0.4, 59.6, 185, 7620)] == ["0 s", "1 min 0 s", "3 min 5 s", "2 h 7 min"]


def test_a_run_tells_its_stage_layers_and_end() -> None:
    heard: list[ProgressEvent] = []
    with Progress("calibrate", heard.append) as progress:
        progress.say("hello")
        progress.start(3, 1, ["a damaged state was passed over"])
        progress.layer(1, (), ["no token reaches expert 2"])
        progress.layer(2, (), ())
    kinds = [event.kind for event in heard]
    assert kinds == ["note", "warning", "note", "begin", "warning", "layer", "layer", "end"]
    assert heard[2].text.startswith("calibrate: resuming at layer 1 of 3")
    layers = [event for event in heard if event.kind == "layer"]
    assert [(event.done, event.total) for event in layers] == [(2, 3), (3, 3)]
    assert layers[1].remaining_s == 0.0 and layers[0].elapsed_s <= layers[1].elapsed_s
    assert all(event.memory_gib > 0 for event in layers)


def test_steps_begin_by_themselves_and_an_unbegun_stage_has_no_end() -> None:
    heard: list[ProgressEvent] = []
    with Progress("awq", heard.append) as progress, progress.new_stage("writing text") as writing:
        writing.step(2, 4)
        writing.step(4, 4, "KL 0.1")
    assert [(event.stage, event.kind, event.done) for event in heard] == [
        ("writing text", "begin", 0),
        ("writing text", "step", 2),
        ("writing text", "step", 4),
        ("writing text", "end", 0),
    ]
    assert (
        heard[1].remaining_s is None and heard[2].remaining_s == 0.0
    )  # the first step began before we looked


def test_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    progress = Progress("awq", ShownProgress(PatientConsole(file=out, highlight=False)))
    progress.warn("look")
    progress.start(2, 0)
    progress.layer(0, (), ())
    progress.stop()
    first, second = out.getvalue().splitlines()
    assert first == "warning: look"
    assert second.startswith("awq: layer 1/2, 0 s gone, 0 s left, ") and second.endswith(" GiB")


def test_a_terminal_that_is_gone_does_not_end_the_run() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

    progress = Progress("test", ShownProgress(PatientConsole(file=Gone())))
    progress.start(2, 0)
    progress.layer(0, (), ["warning"])
    progress.layer(1, (), [])
