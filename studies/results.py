"""docs/results.md: each claim of the report, its metric, a baseline, Sumizome, and how sure the numbers are.

    python -m studies.results

Owns the table alone: numbers come from `docs/studies/*.json`. Those of the demo's model are taken into
`docs/studies/demo.json` from `work/demo` where its evaluation and figures are there. Whether a claim was reproduced is
decided here, by an interval that leaves the baseline out, never by hand.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from studies import canvas, guidance, min_snr
from studies.all_studies import STUDIES
from studies.harness import PAGES, ROOT, SEEDS, Results, read_results
from studies.intervals import differs, paired, seed_interval, told
from studies.page import markdown_table, write_markdown
from studies.tag_weights import band_number
from studies.uptraining import STEPS as UPTRAINED
from studies.uptraining import recovery_words
from sumizome.evaluate.scores import Interval

__all__ = ["Claim", "claims", "main"]

DEMO = ROOT / "work" / "demo"


@dataclass(frozen=True)
class Claim:
    """One row."""

    says: str
    """The report's claim and its section."""
    metric: str
    baseline: str
    ours: str
    rests_on: str
    """Seeds and interval."""
    verdict: str
    command: str


def main() -> None:
    """Writes the page."""
    _take_demo()
    found = [claim for study in STUDIES if (PAGES / f"{study.name}.json").exists() for claim in _of_study(study.name)]
    demo = PAGES / "demo.json"
    if demo.exists():
        found += _of_demo(json.loads(demo.read_text(encoding="utf-8")))
    missing = [study.name for study in STUDIES if not (PAGES / f"{study.name}.json").exists()]
    for name in missing + ([] if demo.exists() else ["the demo's evaluation and figures"]):
        print(f"not on the page, because it has not been run: {name}")
    write_markdown(ROOT / "docs" / "results.md", page(found))


def page(found: list[Claim]) -> str:
    """The page of these claims."""
    head = ["claim of the report", "metric", "baseline", "Sumizome", "seeds, interval", "reproduced", "command"]
    rows = [[c.says, c.metric, c.baseline, c.ours, c.rests_on, c.verdict, f"`{c.command}`"] for c in found]
    failed = [claim for claim in found if not claim.verdict.startswith("yes")]
    said = "\n".join(
        f"- {claim.says}: {claim.verdict}. {claim.metric}: {claim.ours} beside {claim.baseline}." for claim in failed
    )
    return (
        "# Results\n\nThe report's claims on models that two CPU cores train: the demo's (a U-Net of 2.9 M "
        "parameters) and the [studies'](studies/README.md) (1.1 M). They say whether an effect is there and which "
        "way it goes, not how large it is for SDXL. “Reproduced” is yes where the 95 % interval of the difference "
        "from the baseline leaves 0 out and the difference goes the report's "
        f"way.\n\n{markdown_table([head, *rows])}\n\n## What did not "
        f"reproduce\n\n{said or 'All of the above did.'}\n\n*Written by `make results` from `docs/studies/*.json`; "
        "nothing here is written by hand.*"
    )


def verdict(difference: Interval, *, lower: bool) -> str:
    """Whether the difference from the baseline goes the report's way, and can be told from none."""
    if not differs(difference):
        return "not told apart"
    return "yes" if (difference.value < 0) == lower else "no: the other way"


def growth_verdict(exponent: Interval) -> str:
    """Whether σ grows with the canvas' length, to which power: 0 is no growth, 1 is √area."""
    if not differs(exponent):
        return "not told apart from no growth"
    if exponent.low < 0:
        return "no: it falls"
    if exponent.high < 1:
        return "yes; √area is more than is needed"
    return "yes" if exponent.low <= 1 else "no: √area is less than is needed"


def _of_study(name: str) -> list[Claim]:
    return claims[name](read_results(name))


def _seeds() -> str:
    return f"{len(SEEDS)} trainings, Student's t"


def _of_min_snr(results: Results) -> list[Claim]:
    command = "python -m studies min-snr"
    rows = []
    for says, what, baseline, ours, metric in (
        (
            "MinSNR as written is enough beside zero terminal SNR (§2.4)",
            "first",
            min_snr.DEFAULT_ARM,
            "plain",
            "error of the first prediction of black",
        ),
        (
            "MinSNR, γ = 5, balances the timesteps (§2.4)",
            "body",
            "none",
            min_snr.DEFAULT_ARM,
            "velocity loss, mean of t < 900",
        ),
        (
            "MinSNR, γ = 5, balances the timesteps (§2.4)",
            "kernel",
            "none",
            min_snr.DEFAULT_ARM,
            "kernel distance from the data",
        ),
    ):
        number = min_snr.NUMBERS[what]
        of = {arm: results.seeds(arm, number) for arm in (baseline, ours)}
        difference = paired(of[ours], of[baseline])
        found = verdict(difference, lower=True)
        if what == "first":  # enough: not worse than with a floor
            found = "yes" if not differs(difference) or difference.value < 0 else "no: worse than with a floor"
        rows.append(
            Claim(
                says,
                metric,
                f"`{baseline}` {told(seed_interval(of[baseline]))}",
                f"`{ours}` {told(seed_interval(of[ours]))}",
                _seeds(),
                found,
                command,
            )
        )
    return rows


def _of_uptraining(results: Results) -> list[Claim]:
    last = str(UPTRAINED)

    def of(arm: str, number: Callable[[Mapping[str, Any]], float]) -> list[float]:
        return results.seeds(arm, lambda measures: number(measures["after"][last]))

    def black(arm: str) -> list[float]:
        return of(arm, lambda look: look["brightness"]["black"])

    rows = []
    for says, baseline in (
        ("An ε-model cannot draw black; v from pure noise can (§2.1, §2.2)", "epsilon"),
        ("MinSNR alone does not give an ε-model black (§2.4)", "epsilon-min-snr"),
        ("The terminal step replaces offset noise (§2.2)", "epsilon-offset"),
        ("It is the terminal step that gives black, not v alone (§2.2)", "v"),
    ):
        rows.append(
            Claim(
                says,
                "mean brightness of “completely black” (0 = black)",
                f"`{baseline}` {told(seed_interval(black(baseline)))}",
                f"`v-ztsnr` {told(seed_interval(black('v-ztsnr')))}",
                _seeds(),
                verdict(paired(black("v-ztsnr"), black(baseline)), lower=True),
                "python -m studies uptraining",
            )
        )
    recovered = recovery_words(results, "v-ztsnr")
    rows.append(
        Claim(
            "An ε-model is soon itself again as a v-model (§5: half an hour of the cluster)",
            "pictures until the velocity loss is the base's again, each seed",
            f"`epsilon` {recovery_words(results, 'epsilon')}",
            f"`v-ztsnr` {recovered}",
            f"{len(SEEDS)} trainings, each",
            "yes" if "–" not in recovered else f"not within {UPTRAINED * 16} pictures",
            "python -m studies uptraining",
        )
    )
    return rows


def _of_canvas(results: Results) -> list[Claim]:
    rows = []
    for what, metric in (("black", "brightness of black"), ("single", "share of pictures with one character")):
        _, exponent = canvas.growth(results, what)
        if exponent is None:
            ours, found = "not every canvas and seed passes over", "not measured"
        else:
            ours, found = f"exponent {told(exponent, 2)}", growth_verdict(exponent)
        rows.append(
            Claim(
                "σ_max grows with the canvas' length, as √area at most (§2.3)",
                f"σ at which {metric} is half-way to pure noise's, by length",
                "exponent 1 (√area)",
                ours,
                _seeds(),
                found,
                "python -m studies canvas",
            )
        )
    return rows


def _of_tag_weights(results: Results) -> list[Claim]:
    rows = []
    for band, says, lower in (
        ("tail", "Weights by rarity raise rare concepts (§4.3)", False),
        ("head", "… and attenuate over-represented ones (§4.3)", True),
    ):
        of = {arm: results.seeds(arm, lambda m, b=band: band_number(m, b, "recall")) for arm in ("off", "1")}
        rows.append(
            Claim(
                says,
                f"share of obeyed colours, {band} of the frequencies",
                f"`off` {told(seed_interval(of['off']), 2)}",
                f"strength `1` {told(seed_interval(of['1']), 2)}",
                _seeds(),
                verdict(paired(of["1"], of["off"]), lower=lower),
                "python -m studies tag-weights",
            )
        )
    return rows


def _of_guidance(results: Results) -> list[Claim]:
    at = {
        scale: results.seeds("plain", lambda m, s=scale: m["scales"][f"{s:g}"]["kernel"]) for scale in guidance.SCALES
    }
    best = min(at, key=lambda scale: seed_interval(at[scale]).value)
    inside = [scale for scale in guidance.SCALES if 3.5 <= scale <= 5]
    nearest = min(inside, key=lambda scale: seed_interval(at[scale]).value)
    stands_out = all(differs(paired(at[scale], at[nearest])) for scale in guidance.SCALES if scale not in inside)
    found = (
        "yes"
        if best in inside and stands_out
        else "in part: best there, not told apart from all others"
        if best in inside
        else "no"
    )
    return [
        Claim(
            "CFG 3.5 to 5 is right (§6)",
            "kernel distance from the data, without rescale",
            f"best scale {best:g}: {told(seed_interval(at[best]), 1)}",
            f"scale {nearest:g}: {told(seed_interval(at[nearest]), 1)}",
            _seeds(),
            found,
            "python -m studies guidance",
        )
    ]


claims: dict[str, Callable[[Results], list[Claim]]] = {
    "min-snr": _of_min_snr,
    "uptraining": _of_uptraining,
    "guidance": _of_guidance,
    "canvas": _of_canvas,
    "tag-weights": _of_tag_weights,
}
"""Study → the rows that it gives."""


def _take_demo() -> None:
    """Takes the demo's numbers over, where its evaluation and figures are there."""
    evaluation, figures = DEMO / "evaluation.json", DEMO / "figures" / "figures.json"
    if not (evaluation.exists() and figures.exists()):
        return
    facts = json.loads(evaluation.read_text(encoding="utf-8"))
    drawn = json.loads(figures.read_text(encoding="utf-8"))["figures"]
    model = facts["models"][0]
    taken = {
        "step": model["step"],
        "colour_error": model["colour_error"],
        "colours": [{key: row[key] for key in ("colour", "error", "brightness")} for row in model["colours"]],
        "recall": {
            "model": model["tags"]["recall"],
            "chance": model["tags"]["chance"],
            "real": facts["data"]["recall"]["recall"],
        },
        "figures": {
            key: {"number": drawn[key]["number"], "values": drawn[key]["values"]}
            for key in ("1", "2", "3", "4", "8", "B")
        },
    }
    text = json.dumps(taken, ensure_ascii=False, indent=1) + "\n"
    (PAGES / "demo.json").write_text(text, encoding="utf-8")


def _of_demo(demo: Mapping[str, Any]) -> list[Claim]:
    figures = "sumizome figures --model work/demo/run --latents work/demo/latents --out work/demo/figures"
    evaluate = "sumizome evaluate --model work/demo/run --latents work/demo/latents --out work/demo/evaluation.html"
    one, two, three, eight = (demo["figures"][key]["values"] for key in ("1", "2", "3", "8"))
    first, late = (demo["figures"]["4"]["values"][row][0] for row in ("with_terminal_step", "without"))
    left = one["surviving_mean_error"]["14.6"]
    black, finite = Interval(**two["pure"]), Interval(**two["finite"])
    unlike = {start: Interval(**three[start]) for start in ("pure", "finite")}
    square, buckets = Interval(**eight["square"]), Interval(**eight["buckets"])
    recall, chance = Interval(**demo["recall"]["model"]), Interval(**demo["recall"]["chance"])
    colours = {row["colour"]: Interval(**row["error"]) for row in demo["colours"]}
    sampled = "one training, {} sampling seeds, bootstrap"
    return [
        Claim(
            "Noise up to σ = 14.6 leaves the mean colour readable (figure 1)",
            "error of the mean of 128 × 128 noised latents, in deviations",
            f"closed form 14.6/128 = {14.6 / 128:.3f}",
            f"{left:.3f}",
            f"one picture, {one['draws']} draws of noise",
            "yes" if left < 0.2 else "no",
            figures,
        ),
        Claim(
            "“Completely black” is obeyed from pure noise, medium bright from a finite σ (figure 2)",
            "mean brightness, the demo's model",
            f"from σ = {two['finite_sigma']:.2f}: {_ranged(finite)}",
            f"from pure noise: {_ranged(black)}",
            sampled.format(black.count),
            "yes" if black.high < finite.low else "not told apart",
            figures,
        ),
        Claim(
            "Without the terminal step the canvas' mean is pulled to grey (figure 3)",
            "how much brighter a bright canvas is than a dark one, two prompts of opposing colours",
            f"without: {_ranged(unlike['finite'])}",
            f"with: {_ranged(unlike['pure'])}",
            sampled.format(unlike["pure"].count),
            "yes" if unlike["pure"].low > unlike["finite"].high else "not told apart",
            figures,
        ),
        Claim(
            "Without the terminal step the first prediction has the noise's mean, not the picture's (figure 4)",
            f"brightness of the first prediction of black, where sampling starts at σ = {late[0]:.2f}",
            f"without: {late[1]:.3f}",
            f"with, at pure noise: {first[1]:.3f}",
            "one training, one seed",
            "yes" if late[1] > first[1] + 0.05 else "no: black either way",
            figures,
        ),
        Claim(
            "Buckets keep what a square crop cuts off (§4.1, figure 8)",
            "share of a picture that is cut off, the demo's pictures",
            f"square: {square.value:.1%}",
            f"buckets: {buckets.value:.1%} ({buckets.low:.1%} to {buckets.high:.1%})",
            f"{buckets.count} pictures, bootstrap",
            "yes" if buckets.high < square.low else "no",
            figures,
        ),
        Claim(
            "Colours are obeyed (§2.2)",
            "root mean square distance from the colour asked for, mean of black and white; grey for either is 0.5",
            "grey: 0.500",
            f"black {_ranged(colours['black'])}, white {_ranged(colours['white'])}",
            sampled.format(colours["black"].count),
            "yes" if max(colours["black"].high, colours["white"].high) < 0.5 else "no",
            evaluate,
        ),
        Claim(
            "Tags are obeyed (§4.2, §6)",
            "share of a caption's tags found by a classifier of the data's tags",
            f"another caption's: {_ranged(chance)}; real pictures {demo['recall']['real']['value']:.3f}",
            _ranged(recall),
            f"one training, {recall.count} captions, bootstrap",
            "yes" if recall.low > chance.high else "not told apart",
            evaluate,
        ),
    ]


def _ranged(interval: Interval) -> str:
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"


if __name__ == "__main__":
    main()
