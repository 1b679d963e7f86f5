"""The judgement: which rules an artefact meets in one version of an engine, on a number of ranks."""

from dataclasses import asdict, dataclass
from typing import Any

from convert.errors import UsageError
from convert.verdict.artefact import Artefact
from convert.verdict.checks import CHECKS
from convert.verdict.rules import ENGINES, RULES, Outcome, Rule


@dataclass(frozen=True)
class Finding:
    """One rule that applies: what it means, what to do, and the file of the engine that says so."""

    outcome: Outcome
    reason: str
    remedy: str
    source: str


@dataclass(frozen=True)
class Verdict:
    """`outcome`: "loads", "caveat" (loads, but see the findings) or "fails". `notes` tell where rules were not read."""

    engine: str
    version: str
    tp: int
    outcome: Outcome
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The verdict as plain JSON data."""
        return asdict(self)


def parse_engine(text: str) -> tuple[str, str]:
    """ "lmdeploy:0.7.3" -> engine and version; without a version the newest that was read. Raises UsageError for another name."""
    name, _, version = text.partition(":")
    if name not in ENGINES:
        raise UsageError(f"--for {text!r}: expected one of {', '.join(ENGINES)}, with or without :VERSION.")
    if version and _number(version) is None:
        raise UsageError(
            f"--for {text!r}: {version!r} is no version; expected numbers with dots, as in {name}:1.2.3."
        )
    return name, version or ENGINES[name].read[-1]


def judge(artefact: Artefact, engine: str, version: str, tp: int = 1) -> Verdict:
    """Whether `engine` loads the artefact on `tp` ranks, and what stands against it. The worst findings come first."""
    found: list[Finding] = []
    for rule in RULES:
        if rule.engine != engine or not _applies(rule, artefact, version):
            continue
        text = CHECKS[rule.check](artefact, tp, rule.values)
        if text is not None:
            found.append(Finding(rule.outcome, rule.reason.format(found=text), rule.remedy, rule.source))
    found.sort(key=lambda finding: finding.outcome != "fails")
    outcome: Outcome = found[0].outcome if found else "loads"
    return Verdict(engine, version, tp, outcome, tuple(found), tuple(_notes(engine, version)))


def _applies(rule: Rule, artefact: Artefact, version: str) -> bool:
    if rule.formats and artefact.format not in rule.formats:
        return False
    number = _number(version)
    if rule.since and number < _number(rule.since):
        return False
    return not (rule.before and number >= _number(rule.before))


def _notes(engine: str, version: str) -> list[str]:
    read = ENGINES[engine].read
    if version in read:
        return []
    return [
        f"the rules were read in {ENGINES[engine].package} {', '.join(read)}; {version} itself was not read"
    ]


def _number(version: str) -> Any:
    """Comparable numbers of a version, None where it is none."""
    parts = version.split(".")
    if len(parts) > 4 or not all(part.isdecimal() for part in parts):
        return None
    return (*map(int, parts), 0, 0, 0, 0)[:4]
