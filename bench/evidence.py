"""What the docs say about whether alignment helps: sentences and tables from the stored results of studies.

A study is bench/results/NAME.json, written by `agrepa study`. Its file in bench/studies says which comparisons are
reported first; the sentences here follow it, whatever its result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agrepa_fast.errors import UserError
from agrepa_fast.report.html import duration

from .tables import UNMEASURED, markdown

Study = Mapping[str, Any]


@dataclass(frozen=True)
class Shown:
    """How the docs show a study.

    Attributes:
        file: the stem of its JSON file. material, teacher: its data, and its teacher, in words.
        comparisons: (arm, other arm, both in words), in the order in which they are reported. Where there are no words
            the table has the comparison, and the verdict has not.
        choices: (arm, other arm, words): how often the first aligned the layers that the second did.
        numbers: (column, words) of the evaluations that the verdict of generated audio names.
    """

    file: str
    material: str
    teacher: str
    comparisons: tuple[tuple[str, str, str, str], ...]
    choices: tuple[tuple[str, str, str], ...]
    numbers: tuple[tuple[str, str], ...] = ()


NONE = "no alignment"
FOGA = "alignment of the layers that FoG-A chose"
CONTROLS = ("middle", "shallowest", "random")
# By the prefix of their markers in the docs.
STUDIES = {
    "study": Shown(
        "study-cpu",
        "the built-in corpus",
        "the spectral teacher",
        (
            ("even", "none", "alignment of evenly spaced layers, frame by frame,", NONE),
            ("foga", "shallowest", FOGA, "alignment of the shallowest layers"),
        ),
        (("foga", "shallowest", "FoG-A chose the shallowest layers themselves"),),
    ),
    "self": Shown(
        "study-self",
        "the built-in corpus",
        "the network as its own teacher",
        (
            ("layersync-foga", "none", "LayerSync of the layers that FoG-A chose", NONE),
            *(("layersync-foga", f"layersync-{other}", "", "") for other in CONTROLS),
            ("self-flow-foga", "none", "Self-Flow of the layers that FoG-A chose", NONE),
            *(("self-flow-foga", f"self-flow-{other}", "", "") for other in CONTROLS),
        ),
        (
            ("layersync-foga", "layersync-shallowest", "FoG-A chose the shallowest layers themselves"),
            ("layersync-foga", "layersync-middle", "it chose those that were chosen by hand"),
        ),
    ),
    "recordings": Shown(
        "study-recordings",
        "spoken digits and general sounds",
        "the spectral teacher",
        (
            ("foga", "none", f"{FOGA}, frame by frame,", NONE),
            ("foga", "shallowest", FOGA, "alignment of the shallowest layers"),
            ("foga", "deepest", "", ""),
        ),
        (
            ("foga", "shallowest", "FoG-A chose the shallowest layers themselves"),
            ("foga", "deepest", "it chose the deepest ones"),
        ),
        (("FAD", "the Frechet audio distance"), ("WER", "the word error rate")),
    ),
    "taught": Shown(
        "study-taught",
        "spoken digits",
        "a teacher that learned to spell the words",
        (
            ("foga", "none", f"{FOGA}, frame by frame,", NONE),
            ("foga", "shallowest", FOGA, "alignment of the shallowest layers"),
        ),
        (("foga", "shallowest", "FoG-A chose the shallowest layers themselves"),),
        (
            ("WER", "the word error rate"),
            ("FAD", "the Frechet audio distance"),
            ("MCD (dB)", "the mel-cepstral distortion"),
        ),
    ),
}


def is_study(path: Path) -> bool:
    """Whether a file of bench/results holds a study, and no benchmark."""
    return path.stem.startswith("study-")


def load(root: Path) -> dict[str, Study | None]:
    """The stored studies by the prefix of their markers; None where one is not stored.

    Raises:
        UserError: a file cannot be read, or is not what `agrepa study` writes.
    """
    return {
        prefix: _load(root / "bench" / "results" / f"{shown.file}.json", prefix) for prefix, shown in STUDIES.items()
    }


def _load(path: Path, prefix: str) -> Study | None:
    if not path.exists():
        return None
    try:
        study = json.loads(path.read_text(encoding="utf-8"))
        blocks({prefix: study})
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path}: not what agrepa study writes ({error!r})") from None
    return study


def blocks(studies: Mapping[str, Study | None]) -> dict[str, str]:
    """The text of each marker: {marker's name: text}."""
    made = {
        "verdict": verdict,
        "comparisons": comparisons,
        "others": others,
        "arms": arms,
        "seeds": seeds,
        "generated": generated,
        "cost": cost,
    }
    texts = {
        f"{prefix}_{name}": f"{UNMEASURED}." if study is None else make(study, STUDIES[prefix])
        for prefix, study in studies.items()
        for name, make in made.items()
    }
    return texts | {"studies_summary": summary({p: study for p, study in studies.items() if study is not None})}


# --- sentences ----------------------------------------------------------------------------------------------


def summary(studies: Mapping[str, Study]) -> str:
    """All studies in three sentences: against no alignment, against the shallowest layers, and the words understood."""
    if not studies:
        return f"{UNMEASURED}."
    outcomes: dict[str, list[str]] = {"none": [], "shallowest": []}
    words = []
    for prefix, study in studies.items():
        shown = STUDIES[prefix]
        for name, other, *_ in shown.comparisons:
            # The arms without a teacher have the name of their method in front: "self-flow-shallowest".
            against = other.rpartition("-")[2]
            if against in outcomes:
                outcomes[against].append(_change(_compared(study, name, other)))
        if any(column == "WER" for column, _ in shown.numbers):
            changed = _generated_sentence(study, "WER", "the word error rate", f"with {shown.teacher}")
            words += [changed] if changed else []
    sentences = [
        f"{len(studies)} studies at the scale of two CPU cores compare alignment with no alignment "
        f"{len(outcomes['none'])} times: it {_tally(outcomes['none'])}",
        f"they compare the layers that FoG-A chose with the shallowest layers {len(outcomes['shallowest'])} times: "
        f"FoG-A's {_tally(outcomes['shallowest'])}",
        *words,
    ]
    return " ".join(f"{_capital(sentence, wanted=True)}." for sentence in sentences)


def _tally(changes: Sequence[str]) -> str:
    """How many of these changes of the validation loss went which way."""
    lowered, raised = changes.count("lowered"), changes.count("raised")
    return (
        f"lowered the validation loss in {lowered}, raised it in {raised}, and did not measurably change it in "
        f"{len(changes) - lowered - raised}"
    )


def verdict(study: Study, shown: Shown) -> str:
    """A sentence for every comparison that was to be reported first, in its order."""
    config = study["config"]
    model = f"{config['model']['depth']} blocks of width {config['model']['width']}"
    told = [_sentence(study, *comparison) for comparison in shown.comparisons if comparison[2]]
    told += [_generated_sentence(study, *number) for number in shown.numbers]
    first, *rest = (sentence for sentence in told if sentence)
    return " ".join(
        [f"In runs of {config['train']['steps']} steps ({model}, {shown.material}, {shown.teacher}), {first}."]
        + [f"{'There, ' if number == 0 else ''}{_capital(each, number > 0)}." for number, each in enumerate(rest)]
    )


def _capital(sentence: str, wanted: bool) -> str:
    return sentence[0].upper() + sentence[1:] if wanted else sentence


def _sentence(study: Study, name: str, other: str, words: str, than: str) -> str:
    by_name = _by_name(study)
    difference, base = _compared(study, name, other), by_name[other]["loss"]["value"]
    change = _change(difference)
    return f"{words} {change} the validation loss compared with {than} ({_numbers(study, difference, base)})"


def _compared(study: Study, name: str, other: str) -> Mapping[str, Any]:
    """The paired difference of two arms."""
    [setting] = study["settings"]
    for each in setting.get("comparisons", ()):
        if (each["arm"], each["other"]) == (name, other):
            return each["difference"]
    return _by_name(study)[name]["differences"][other]


def _change(difference: Mapping[str, Any]) -> str:
    if _unclear(difference):
        return "did not measurably change"
    return "lowered" if difference["value"] < 0 else "raised"


def _unclear(difference: Mapping[str, Any]) -> bool:
    """Whether the interval holds zero, or there is none."""
    low, high = difference["low"], difference["high"]
    return low is None or high is None or low <= 0 <= high


def _generated_sentence(study: Study, column: str, words: str, teacher: str = "") -> str:
    """What the arm foga changed in one number of the evaluations; empty where there is no such number.

    teacher: words that say which one, where studies of several stand side by side.
    """
    for number in _generated(study):
        arms = {arm["arm"]: arm for arm in number["arms"]}
        if number["column"] == column and "foga" in arms and arms["foga"]["less_none"] is not None:
            difference = arms["foga"]["less_none"]
            base = arms["none"]["mean"]["value"]
            recordings = number["recordings"]["reference"]
            own = "" if recordings is None else f"; {recordings['value']:.4g} for recordings"
            aligned = f"alignment of FoG-A's layers {teacher}".rstrip()
            return (
                f"{aligned} {_change(difference)} {words} of what a run generates "
                f"({_numbers(study, difference, base)}; {base:.4g} without alignment{own})"
            )
    return ""


def _numbers(study: Study, difference: Mapping[str, Any], base: float) -> str:
    value, low, high = (difference[key] for key in ("value", "low", "high"))
    between = ""
    if low is not None and high is not None:
        between = f", {study['confidence']:.0%} interval {_share(low, base)} to {_share(high, base)}"
    return f"{_share(value, base)}{between}; lower for {difference['lower']} of {difference['seeds']} seeds"


def others(study: Study, shown: Shown) -> str:
    """The other arms whose interval against no alignment leaves out zero; and how often two arms align the same."""
    by_name = _by_name(study)
    base = by_name["none"]["loss"]["value"]
    told = [name for name, other, words, _ in shown.comparisons if words and other == "none"]
    clear = []
    for name, arm in by_name.items():
        difference = arm["differences"].get("none")
        if name not in told and difference is not None and not _unclear(difference):
            clear.append(f"`{name}` ({_numbers(study, difference, base)})")
    outcome = (
        f"these differ from `none` by more than their interval: {', '.join(clear)}"
        if clear
        else "none differs from `none` by more than its interval"
    )
    same = ", and ".join(_same(by_name, *choice) for choice in shown.choices)
    return f"Of the other arms, {outcome}. {same}."


def _same(by_name: Mapping[str, Any], name: str, other: str, words: str) -> str:
    first, second = (
        {run["seed"]: set(run["selection"]["layers"]) for run in by_name[each]["runs"]} for each in (name, other)
    )
    count = sum(second.get(seed) == chosen for seed, chosen in first.items())
    return f"{words} for {count} of {len(first)} seeds"


def cost(study: Study, shown: Shown) -> str:
    """How long the study takes: the training of all its runs and of the warm-ups that they share."""
    share = study["config"]["probe"]["start"] / study["config"]["train"]["steps"]
    runs = {run["folder"]: run for arm in _by_name(study).values() for run in arm["runs"]}
    warmups: dict[str, float] = {}
    for run in runs.values():
        warmups.setdefault(run["warmup"], share * run["seconds"])
    total = sum((1 - share) * run["seconds"] for run in runs.values()) + sum(warmups.values())
    return (
        f"The training of its {len(runs)} runs and {len(warmups)} warm-ups took {duration(total)} in all, one after "
        f"another and beside other programs; at that pace two workers need about {duration(total / 2)}. Validation, "
        "evaluations and starting are not counted."
    )


def _share(value: float, base: float) -> str:
    return f"{100 * value / base:+.2f} %"


# --- tables -------------------------------------------------------------------------------------------------


def _by_name(study: Study) -> dict[str, Any]:
    [setting] = study["settings"]
    return {arm["arm"]: arm for arm in setting["arms"]}


def _generated(study: Study) -> Sequence[Mapping[str, Any]]:
    [setting] = study["settings"]
    return setting.get("generated", ())


def _interval(difference: Mapping[str, Any] | None) -> str:
    """A difference with its interval; bold where that leaves out zero."""
    if difference is None:
        return "–"
    value, low, high = (difference[key] for key in ("value", "low", "high"))
    if low is None or high is None:
        return f"{value:+.5f}"
    text = f"{value:+.5f} [{low:+.5f}, {high:+.5f}]"
    return text if low <= 0 <= high else f"**{text}**"


def _lower(difference: Mapping[str, Any] | None) -> str:
    return "–" if difference is None else f"{difference['lower']} of {difference['seeds']}"


def comparisons(study: Study, shown: Shown) -> str:
    """The comparisons that were to be reported first."""
    by_name, rows = _by_name(study), []
    for name, other, *_ in shown.comparisons:
        difference = _compared(study, name, other)
        share = _share(difference["value"], by_name[other]["loss"]["value"])
        rows.append([f"`{name}` less `{other}`", _interval(difference), share, _lower(difference)])
    return markdown(["comparison", "difference of the loss", "share", "seeds lower"], rows)


def arms(study: Study, shown: Shown) -> str:
    """Every arm: its loss, its differences to no alignment and to the shallowest layers, and its steps to a loss."""
    by_name = _by_name(study)
    baselines = [name for name in ("none", "shallowest") if name in by_name]
    rows = []
    for name, arm in by_name.items():
        differences = [arm["differences"].get(other) for other in baselines]
        target = arm["targets"][0] if arm["targets"] else None
        steps = "–"
        if target is not None:
            # Where some runs never get there, a mean of the others would flatter the arm.
            mean = target["step"]
            steps = f"{mean:.0f}" if mean is not None else f"reached in {target['reached']} of {target['of']}"
        rows.append([name, f"{arm['loss']['value']:.4f}", *map(_interval, differences), _lower(differences[0]), steps])
    less = [f"less {name}'s" for name in baselines]
    return markdown(["arm", "loss", *less, "lower than none", "steps to none's final loss"], rows)


def seeds(study: Study, shown: Shown) -> str:
    """The difference to no alignment for each seed, and the layers that were aligned."""
    compared = {name: arm for name, arm in _by_name(study).items() if arm["differences"].get("none") is not None}
    complete = list(dict.fromkeys(seed for arm in compared.values() for seed in arm["differences"]["none"]["by_seed"]))
    rows = []
    for name, arm in compared.items():
        difference = arm["differences"]["none"]["by_seed"]
        layers = {str(run["seed"]): _layers(run["selection"]) for run in arm["runs"]}
        cells = [f"{difference[seed]:+.5f} ({layers[seed]})" if seed in difference else "–" for seed in complete]
        rows.append([name, *cells])
    return markdown(["arm", *(f"seed {seed}" for seed in complete)], rows)


def _layers(selection: Mapping[str, Any]) -> str:
    toward = f" toward {selection['target']}" if "target" in selection else ""
    return f"layers {', '.join(map(str, selection['layers']))}{toward}"


def generated(study: Study, shown: Shown) -> str:
    """What `agrepa evaluate` measured at the end of runs: recordings, each arm, and the difference to no alignment."""
    rows = []
    for number in _generated(study):
        name = f"{number['column']}, {number['domain']} ({number['better']} is better)"
        for of, mean in number["recordings"].items():
            if mean is not None:
                rows.append([name, of, f"{mean['value']:.4f}", "–", "–"])
        for arm in number["arms"]:
            difference = arm["less_none"]
            rows.append([name, arm["arm"], f"{arm['mean']['value']:.4f}", _interval(difference), _lower(difference)])
    if not rows:
        return "Nothing that the runs generate was measured."
    return markdown(["measured", "of", "mean over seeds", "less none's", "seeds lower"], rows)
