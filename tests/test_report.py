"""The report page: self-contained, honest, and text stays text whatever it holds."""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from typing import Any

import pytest

from goodfit.report import render
from goodfit.report.charts import BOTTOM, LEFT, MOST_POINTS, RIGHT, TOP, curves, histogram, number, percent

HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "<!--<script>",
    "-->",
    "]]>",
    "</title><h1>x",
    "</style><style>*{display:none}",
    "</textarea><iframe src=javascript:alert(1)>",
    "<base href=//evil.example>",
    "<meta http-equiv=refresh content=0>",
    "{{7*7}}",
    "{% for x in y %}",
    "{# comment",
    "${7*7}",
    "&lt;b&gt;&amp;&#60;script&#62;",
    "\u202egnp.exe",
    "שלום עולם",
    "🙂👨‍👩‍👧",
    "\u2028\u2029\x00\x0b",
    "\ud800 lone",
    '" onmouseover=alert(1) x="',
    "`onclick=alert(1)`",
    "x" * 4096,
    "<" * 4096,
    "\\u003cscript\\u003e",
    "javascript:alert(1)",
    "a\r\nSet-Cookie: b",
    "C:\\new\\table",
    "'; DROP TABLE runs; --",
]


class Page(HTMLParser):
    """Tags, attributes, visible text and the JSON block of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text, self.block, self.inside = "", "", ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.block += data
        elif self.inside != "style":
            self.text += data

    def of(self, tag: str, css: str) -> list[dict[str, str | None]]:
        """Attributes of the elements of one class, in order."""
        found: list[dict[str, str | None]] = []
        for name, key, value in self.attributes:
            if name == tag and key == "class":
                found.append({"class": value})
            elif found and name == tag:
                found[-1].setdefault(key, value)
        return [attributes for attributes in found if attributes["class"] == css]


def epochs(train: Any, valid: Any, count: int = 40) -> list[dict[str, Any]]:
    return [
        {"epoch": e, "train_loss": train(e), "valid_loss": valid(e), "penalty": 0.01, "best": 0.5, "seconds": 0.1}
        for e in range(1, count + 1)
    ]


def sample() -> dict[str, Any]:
    edges = [-1 + index * 0.05 for index in range(41)]
    hump = [round(400 * math.exp(-((index - 20) ** 2) / 30)) for index in range(40)]
    kernel = {"edges": edges, "regularized": [*hump[:20], 3000, *hump[21:]], "bare": hump}
    sizes: dict[str, Any] = {"norm": 3.2, "bare_zeros": 0.0, "bare_norm": 9.1}
    return {
        "title": "churn",
        "command": "goodfit fit churn.csv --target churn",
        "created": "2026-11-23T05:00:00",
        "task": "classes",
        "target": "churn",
        "classes": ["no", "yes"],
        "cocktail": "Dropout(0.2), EarlyStopping(20)",
        "cocktail_repr": "Cocktail(Dropout(rate=0.2), EarlyStopping(patience=20))",
        "network": "MLP 31 → 256 → 2",
        "parameters": 74754,
        "rows": {"train": 341, "valid": 114, "test": 113},
        "duplicates": {"valid": 0, "test": 2},
        "columns": [{"name": "age", "kind": "number", "missing": 3, "distinct": 45, "used": True, "note": "in years"}],
        "notes": ["column id: left out, it looks like an identifier"],
        "metric": "log_loss",
        "scores": {
            "regularized": {
                "train": {"log_loss": 0.0812, "accuracy": 0.97},
                "valid": {"log_loss": 0.2004, "accuracy": 0.96},
                "test": {"log_loss": 0.23456, "accuracy": 0.9514},
            },
            "bare": {"train": {"log_loss": 0.001, "accuracy": 1.0}, "valid": {"log_loss": 0.91, "accuracy": 0.92}},
        },
        "baseline": {"valid": {"log_loss": 0.66, "accuracy": 0.6}},
        "history": {
            "regularized": epochs(lambda e: 0.7 / e + 0.1, lambda e: 0.2 + (e - 20) ** 2 / 1000),
            "bare": epochs(lambda e: 0.7 / e, lambda e: 0.3 + (e - 9) ** 2 / 1000),
        },
        "best_epoch": 20,
        "stop_epoch": 32,
        "stopped": "no improvement in 12 checks",
        "weights": [
            {"name": "0.weight", "shape": [256, 31], "role": "kernel", "zeros": 0.31, "histogram": kernel, **sizes},
            {"name": "0.bias", "shape": [256], "role": "bias", "zeros": 0.0, "histogram": kernel, **sizes},
        ],
        "seed": 0,
        "versions": {"goodfit": "0.1.0", "torch": "2.13.0"},
        "seconds": 12.3,
    }


def infect(data: dict[str, Any], text: str) -> dict[str, Any]:
    """`data` with `text` in every field that holds words."""
    data = copy.deepcopy(data)
    for key in ("title", "command", "created", "target", "cocktail", "cocktail_repr", "network", "stopped", "refit"):
        data[key] = text
    data["classes"], data["notes"] = [text, text], [text]
    data["columns"][0] |= {"name": text, "kind": text, "note": text}
    data["weights"][0]["name"] = text
    data["weights"][1]["role"] = text
    data["versions"] = {text: text, "torch": text}
    for split in data["scores"]["regularized"].values():
        split[text] = split.pop("accuracy")
    for split in [*data["scores"]["bare"].values(), data["baseline"]["valid"]]:
        split[text] = split.pop("accuracy")
    return data


def test_the_page_needs_nothing_but_itself() -> None:
    html = render(sample())
    page = Page(html)
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert "url(" not in html.replace("url(#frame)", "")
    assert page.tags["script"] == 1
    assert html.count("<script") == 1
    assert ("script", "type", "application/json") in page.attributes
    names = {name for _, name, _ in page.attributes}
    assert "src" not in names
    assert not any(name.startswith("on") for name in names)
    assert {value for _, name, value in page.attributes if name == "href"} == {"data:,"}
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in html
    assert html.index("Content-Security-Policy") < html.index("<title>")
    assert len(html.encode()) < 300_000


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_text(text: str) -> None:
    harmless, html = Page(render(infect(sample(), "word"))), render(infect(sample(), text))
    page = Page(html)
    assert page.tags == harmless.tags
    assert [(tag, name) for tag, name, _ in page.attributes] == [(tag, name) for tag, name, _ in harmless.attributes]
    assert json.loads(page.block) == infect(sample(), text)
    assert not set(page.block) & set("<>&\u2028\u2029")
    html.encode("utf-8")


def test_long_names_are_cut_but_whole_in_their_title() -> None:
    page = Page(render(infect(sample(), "y" * 4096)))
    assert "y" * 400 not in page.text.replace("y" * 3999 + "…", "")
    assert ("bdi", "title", "y" * 4096) in page.attributes


def test_strings_that_say_they_are_safe_are_escaped_too() -> None:
    class Safe(str):
        def __html__(self) -> str:
            return str(self)

    assert "<b>bold" not in render(sample() | {"title": Safe("<b>bold</b>")})


def test_the_block_holds_the_data_with_null_for_what_is_not_a_number() -> None:
    data = sample()
    assert json.loads(Page(render(data)).block) == data
    data["seconds"], data["history"]["bare"][3]["valid_loss"], data["weights"][0]["norm"] = math.nan, math.inf, -math.inf
    found = json.loads(Page(render(data)).block)
    assert (found["seconds"], found["history"]["bare"][3]["valid_loss"], found["weights"][0]["norm"]) == (None, None, None)
    assert math.isnan(data["seconds"])


def test_the_test_score_is_on_the_page_once() -> None:
    text = Page(render(sample())).text
    assert len(re.findall(r"0\.23(?:4|5)\d*", text)) == 1
    assert text.count("0.2346") == 1
    assert text.count("0.9514") == 1


def test_a_test_score_of_the_bare_network_is_never_shown() -> None:
    data = sample()
    data["scores"]["bare"]["test"] = {"log_loss": 0.7777}
    assert "0.7777" not in Page(render(data)).text


def test_the_verdict_when_it_helped() -> None:
    text = Page(render(sample())).text
    assert "Regularization helped." in text
    assert "validation loss is 0.2000, from epoch 20; the bare one’s best was 0.3000, at epoch 9, and it ended at 1.261" in text
    assert "it had started to memorise at epoch 9." in text


@pytest.mark.parametrize(
    ("best", "slope", "words"),
    [
        (0.1, 0.0, "Regularization did not help."),
        (0.1, 1e-3, "Regularization did not help."),
        (0.2, 0.0, "Regularization made no difference."),
        (0.2001, 1e-3, "Regularization made it no better."),
        (0.3, 0.0, "Regularization helped."),
    ],
)
def test_the_verdict_is_honest_both_ways(best: float, slope: float, words: str) -> None:
    data = sample()
    data["history"]["bare"] = epochs(lambda e: 0.7 / e, lambda e: best + slope * (e - 9) ** 2)
    text = Page(render(data)).text
    assert words in text
    assert ("memorise" in text) == (slope > 0)
    assert text.count("Regularization helped.") == (words == "Regularization helped.")


def test_rising_validation_loss_without_falling_training_loss_is_not_memorising() -> None:
    data = sample()
    data["history"]["bare"] = epochs(lambda e: 0.5 + e / 50, lambda e: 0.3 + (e - 9) ** 2 / 1000)
    assert "memorise" not in Page(render(data)).text


def test_it_warns_of_a_network_no_better_than_the_baseline_and_of_copied_rows() -> None:
    data = sample()
    text = Page(render(data)).text
    assert "2 test rows stand in an earlier part too." in text
    assert "no better than predicting" not in text
    data["baseline"]["valid"]["log_loss"] = 0.15
    assert "no better than predicting the class shares." in Page(render(data)).text


def test_the_stop_mark_and_the_best_dot_are_in_their_places() -> None:
    page = Page(render(sample()))
    (stop,) = page.of("line", "stop")
    expected = LEFT + (32 - 1) / (40 - 1) * (RIGHT - LEFT)
    assert float(stop["x1"] or 0) == float(stop["x2"] or 0) == pytest.approx(expected, abs=0.06)
    (best,) = page.of("circle", "best")
    assert float(best["cx"] or 0) == pytest.approx(LEFT + 19 / 39 * (RIGHT - LEFT), abs=0.06)
    assert TOP < float(best["cy"] or 0) < BOTTOM
    (curve,) = page.of("polyline", "curve regularized valid")
    assert f"{best['cx']},{best['cy']}" in (curve["points"] or "").split()
    assert {f'x="{LEFT:g}"', f'width="{RIGHT - LEFT:g}"', f'height="{BOTTOM - TOP:g}"'} <= set(
        re.findall(r'\w+="\d+"', render(sample()))
    )


def test_what_is_not_a_number_is_a_gap() -> None:
    data = sample()
    for epoch in (5, 10, 12):
        data["history"]["regularized"][epoch - 1]["valid_loss"] = math.nan if epoch == 5 else None
    page = Page(render(data))
    assert [len((s["points"] or "").split()) for s in page.of("polyline", "curve regularized valid")] == [4, 4, 28]
    assert len(page.of("circle", "dot regularized")) == 1
    assert not re.search(r"\bnan\b|\binf\b|None", Page(render(data)).text)


def test_the_axis_is_logarithmic_only_for_a_wide_positive_range() -> None:
    def log(low: float) -> bool:
        found = curves({"regularized": epochs(lambda e: 1.0, lambda e: low if e == 9 else 1.0)}, None, None)
        assert found is not None
        return found.log

    assert [log(low) for low in (0.5, 0.04, 0.03, 0.0, -1.0)] == [False, False, True, False, False]


@pytest.mark.parametrize("steep", [0.5, 1e6])
def test_a_diverging_bare_network_does_not_squash_the_rest(steep: float) -> None:
    history = sample()["history"]
    history["bare"] = epochs(lambda e: 0.5, lambda e: 0.4 + steep * max(e - 9, 0))
    found = curves(history, 20, 32)
    assert found is not None
    line = next(line for line in found.lines if (line.network, line.split) == ("regularized", "valid"))
    heights = [float(point.split(",")[1]) for point in line.segments[0].split()]
    assert max(heights) - min(heights) > (BOTTOM - TOP) / 5
    assert "highest loss" in found.clipped[0]
    assert "bare, validation, epoch 40" in found.clipped[0]


def test_ticks_are_round_numbers() -> None:
    found = curves(sample()["history"], 20, 32)
    assert found is not None
    assert [tick.text for tick in found.x_ticks] == ["5", "10", "15", "20", "25", "30", "35", "40"]
    assert all(re.fullmatch(r"\d+|0\.\d{1,2}", tick.text) for tick in found.y_ticks)
    assert 3 <= len(found.y_ticks) <= 9


@pytest.mark.parametrize("loss", [0.5, 0.0, -2.0, 1e-300, 1e29, None, math.nan])
@pytest.mark.parametrize("count", [1, 2, 30])
def test_short_and_flat_histories(loss: float | None, count: int) -> None:
    data = sample() | {"best_epoch": 1, "stop_epoch": count}
    data["history"] = {"regularized": epochs(lambda e: loss, lambda e: loss, count), "bare": []}
    page = Page(render(data))
    drawn = loss is not None and not math.isnan(loss)
    assert len(page.of("line", "stop")) == len(page.of("circle", "best")) == drawn
    assert ("There is no loss to draw." in page.text) != drawn
    assert len(page.of("circle", "dot regularized")) == (2 if drawn and count == 1 else 0)
    assert not any(value and "nan" in value for _, name, value in page.attributes if name in ("points", "cx", "cy", "y1"))


def test_long_histories_are_thinned_but_keep_best_and_stop() -> None:
    data = sample() | {"best_epoch": 778, "stop_epoch": 955}
    data["history"] = {key: epochs(lambda e: 1 / e, lambda e: 2 / e, 1000) for key in ("regularized", "bare")}
    html = render(data)
    page = Page(html)
    (curve,) = page.of("polyline", "curve regularized valid")
    points = (curve["points"] or "").split()
    (best,) = page.of("circle", "best")
    (stop,) = page.of("line", "stop")
    assert 200 < len(points) <= MOST_POINTS
    assert f"{best['cx']},{best['cy']}" in points
    assert any(point.startswith(f"{stop['x1']},") for point in points)
    assert points[-1].startswith(f"{RIGHT:g},")


def test_ten_thousand_columns() -> None:
    data = sample()
    data["columns"] = [data["columns"][0] | {"name": f"column_{index}"} for index in range(10_000)]
    html = render(data)
    page = Page(html)
    assert "column_199" in page.text
    assert "column_200" not in page.text
    assert "9,800 more columns" in page.text
    assert len(html) - len(page.block) < 150_000
    assert len(html) < 1_500_000


def test_only_twelve_histograms_and_only_of_kernels() -> None:
    data = sample()
    assert render(data).count('class="area"') == 1
    data["weights"] = [data["weights"][0] | {"name": f"{index}.weight"} for index in range(30)]
    html = render(data)
    assert html.count('class="area"') == 12
    assert "18 more kernels" in html


def test_the_share_of_exact_zeros_is_a_pin_at_zero() -> None:
    bars = histogram(sample()["weights"][0])
    assert bars is not None
    assert bars.spike is not None
    assert bars.spike.x == 120.0
    assert bars.spike.text == "31.0 % exactly 0"
    assert bars.bare_spike is None


@pytest.mark.parametrize(
    "broken", [None, {}, {"edges": [0, 1], "regularized": [], "bare": []}, {"edges": [1], "regularized": [1]}]
)
def test_a_weight_without_counts_has_no_histogram(broken: Any) -> None:
    data = sample()
    data["weights"][0]["histogram"] = broken
    assert 'class="area"' not in render(data)


@pytest.mark.parametrize("empty", [None, "empty", "gone"])
@pytest.mark.parametrize("key", sorted(sample()))
def test_every_part_may_be_missing(key: str, empty: str | None) -> None:
    data = sample()
    if empty == "gone":
        del data[key]
    else:
        data[key] = type(data[key])() if empty else None
    assert "</html>" in render(data)
    assert "None" not in Page(render(data)).text


def test_without_a_bare_network_there_is_nothing_to_compare() -> None:
    data = sample()
    data["history"]["bare"], data["scores"]["bare"] = [], {}
    text = Page(render(data)).text
    assert "Nothing to compare with." in text
    assert "helped" not in text
    assert "</html>" in render({})


def test_numbers_read_well() -> None:
    found = [number(value) for value in (0.12873, 1.0, 3, 12.345, 1234567, 0.0041, 2e-5, 0.0, -0.5, None, math.nan)]
    assert found == ["0.1287", "1.000", "3", "12.35", "1,234,567", "0.0041", "2e−05", "0", "−0.5000", "–", "–"]
    assert [percent(share) for share in (0.0, 0.0004, 0.314, 0.99999, 1.0, None)] == [
        "0 %", "0.04 %", "31.4 %", "> 99.9 %", "100 %", "–",
    ]  # fmt: skip


def test_checks_by_steps_are_drawn_over_steps() -> None:
    history = {
        name: [row | {"epoch": 1 + i // 2, "step": 50 * (i + 1)} for i, row in enumerate(rows)]
        for name, rows in sample()["history"].items()
    }
    page = render(sample() | {"history": history, "check_every": 50, "best_step": 1000, "stop_step": 1600})
    found = curves(history, 1000, 1600, "step")
    assert found is not None
    assert (found.best, found.stop) == tuple(getattr(curves(sample()["history"], 20, 32), name) for name in ("best", "stop"))
    assert f'cx="{found.best.x}"' in page
    assert "Loss by step" in page
    assert "from step 1000" in page
    assert "The weights of step 1000 were kept." in page


def test_a_refit_network_is_a_row_of_its_own_with_a_test_alone() -> None:
    data = sample() | {"refit": "refit on train and valid for the 20 epochs of the kept weights, which are 80 steps"}
    data["scores"]["refit"] = {"test": {"log_loss": 0.21}}
    page = render(data)
    said = page[page.index("The network that predicts was") :]
    assert data["refit"] in said[: said.index("</p>")]
    row = page[page.index('<th scope="row">Refit</th>') :]
    assert row[: row.index("</tr>")].count("<td") == 3
    assert "0.2100" in row[: row.index("</tr>")]
    assert "Refit</th>" not in render(sample())
