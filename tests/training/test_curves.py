import math
import re
from xml.etree import ElementTree

import matplotlib
import pytest

from triptych.training.curves import _extremes, _smooth, render_curves


def event(step, split="train", **values):
    return {
        "step": step,
        "split": split,
        **{name.replace("__", "/"): value for name, value in values.items()},
    }


def run(num_steps=40):
    events = [
        event(
            step,
            loss=1 / step,
            rewards__accuracies=0.5 + step / 100,
            rewards__margins=step / 10,
            logps__chosen=-10.0,
            logps__rejected=-10.0 - step,
            learning_rate=1e-6 * step,
            grad_norm=1.0,
        )
        for step in range(1, num_steps + 1)
    ]
    events.append(event(40, "eval", loss=0.3, rewards__accuracies=0.8, rewards__accuracies_low=0.7))
    return events


def num_paths(svg, style):
    return sum(style in element.get("style", "") for element in ElementTree.fromstring(svg).iter("path"))


def test_each_known_metric_has_its_panel_in_order():
    assert [curve.title for curve in render_curves(run())] == [
        "Loss",
        "Accuracy",
        "Margin",
        "Log-probability",
        "Learning rate",
        "Gradient norm",
    ]
    assert render_curves([]) == ()
    assert render_curves([event(1, unknown=1.0)]) == ()


def test_the_svg_holds_shapes_and_text_alone():
    names = []
    for curve in render_curves(run()):
        root = ElementTree.fromstring(curve.svg)
        assert {element.tag for element in root.iter()} <= {
            "svg", "g", "defs", "path", "text", "use", "clipPath", "rect"
        }  # fmt: skip
        assert "http" not in curve.svg
        assert not re.search(r"\d{4}-\d\d-\d\dT|<\?|<!|xmlns|#0a0b0", curve.svg)
        names += [element.get("id") for element in root.iter() if element.get("id")]
        assert set(re.findall(r"(?:href=\"|url\()#([\w-]+)", curve.svg)) <= set(names)
    assert len(names) == len(set(names))


def test_the_same_metrics_give_the_same_bytes_and_leave_the_settings_alone():
    before = dict(matplotlib.rcParams)
    first = [curve.svg for curve in render_curves(run())]
    assert [curve.svg for curve in render_curves(run())] == first
    assert dict(matplotlib.rcParams) == before


def test_a_users_own_settings_do_not_change_the_drawing():
    expected = [curve.svg for curve in render_curves(run())]
    with matplotlib.rc_context({"axes.facecolor": "red", "svg.fonttype": "path", "lines.linewidth": 9}):
        assert [curve.svg for curve in render_curves(run())] == expected


def test_the_legend_names_last_values_and_intervals():
    curves = {curve.title: curve for curve in render_curves(run())}
    accuracy = curves["Accuracy"].marks
    assert [(mark.label, mark.held_out) for mark in accuracy] == [("training", False), ("held out", True)]
    assert accuracy[1].value == "0.8 [0.7, 0.8]"
    assert [(mark.label, mark.series) for mark in curves["Log-probability"].marks] == [
        ("chosen, training", 1),
        ("rejected, training", 2),
    ]
    assert curves["Learning rate"].marks[0].value == "4e\u22125"
    assert "held out ends at 0.8 [0.7, 0.8]" in curves["Accuracy"].svg


def test_training_is_a_thin_and_a_smoothed_line_and_accuracy_has_its_chance_line():
    curves = {curve.title: curve for curve in render_curves(run())}
    for title in ("Loss", "Accuracy", "Gradient norm"):
        assert num_paths(curves[title].svg, "stroke-width: 0.7") == (title != "Gradient norm")
        assert num_paths(curves[title].svg, "stroke-width: 1.8") == 1
    assert num_paths(curves["Accuracy"].svg, "stroke: var(--muted)") == 1
    assert num_paths(curves["Loss"].svg, "stroke: var(--muted)") == 0
    assert num_paths(curves["Accuracy"].svg, "stroke-width: 1.2") == 1
    assert num_paths(curves["Loss"].svg, "stroke-width: 1.2") == 0


def test_the_smoothed_line_is_a_bias_corrected_mean():
    # 12 values: span 5, so each earlier value counts 2/3 of the next.
    smooth = _smooth([3.0, 0.0] + [0.0] * 10)
    assert smooth[0] == pytest.approx(3)
    assert smooth[1] == pytest.approx(3 * (2 / 3) / (1 + 2 / 3))
    assert _smooth([5.0] * 100) == pytest.approx([5.0] * 100)
    assert _smooth([1.0, 9.0]) == [1.0, 9.0]


def test_thinning_a_long_run_keeps_its_spikes_and_ends():
    values = [0.0] * 100_000
    values[54_321], values[70_007] = 7.0, -7.0
    steps, thin = _extremes(range(1, 100_001), values)
    assert len(steps) <= 402
    assert thin[steps.index(54_322)] == 7.0
    assert thin[steps.index(70_008)] == -7.0
    assert (steps[0], steps[-1]) == (1, 100_000)
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_what_cannot_be_drawn_is_counted_and_the_rest_drawn(bad):
    (curve,) = render_curves([event(1, loss=1.0), event(2, loss=bad), event(3, loss=0.5)])
    assert curve.note == "1 value is not finite and not drawn."
    assert curve.marks[0].value == "0.5"
    assert render_curves([event(1, loss=bad)]) == ()


def test_one_point_and_constant_and_hostile_values_draw():
    assert len(render_curves([event(1, loss=0.7)])) == 1
    assert len(render_curves([event(step, loss=0.0) for step in range(20)])) == 1
    hostile = [event(1, loss="<script>"), event(2, loss=None), event(3, loss=True), event(4, loss=10**400)]
    assert render_curves(hostile) == ()
    assert render_curves([event(5, loss=0.5), *hostile])[0].note == "4 values are not finite and not drawn."


def test_a_step_logged_twice_shows_the_later_value():
    (curve,) = render_curves([event(1, loss=9.0), event(2, loss=1.0), event(1, loss=2.0)])
    assert "training ends at 1" in curve.svg
    assert '">9<' not in curve.svg


def test_ticks_keep_their_digits():
    events = [{"step": i, "split": "train", "learning_rate": 2e-4} for i in range(4)]
    (curve,) = render_curves(events)
    ticks = {float(t) for t in re.findall(r"<text[^>]*>([\d.]+)</text>", curve.svg) if "." in t}
    assert len(ticks) > 1
    assert all(1e-4 < t < 3e-4 for t in ticks)
    # Ticks at 0, 0.004, 0.008 and 0.012: two decimals would make three of them 0.
    events = [{"step": i, "split": "train", "loss": 0.006 * i} for i in range(3)]
    (curve,) = render_curves(events)
    ticks = re.findall(r"<text[^>]*>(0\.\d+)</text>", curve.svg)
    assert len({float(t) for t in ticks}) == len(ticks) >= 3
