"""Methods that end in a differentiable loss, token by token as their papers write them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from agentdistill.methods import compile as plan
from agentdistill.methods.index import get
from agentdistill.methods.schedule import Controller
from agentdistill.records import Author, Verdict
from tests.methods import (
    Play,
    Token,
    check,
    clipped,
    episodes,
    mean,
    read,
    scored,
    set_gains,
    trained_tokens,
    won,
)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()


def jsd(log_s: Tensor, log_t: Tensor, beta: float = 0.5) -> Tensor:
    """Section 1.4: beta KL(T || M) + (1 - beta) KL(S || M)."""
    log_m = ((1 - beta) * log_s.exp() + beta * log_t.exp()).log()
    return beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m)


def by_tokens(name: str, loss: Callable[[Token], Tensor]) -> Callable[..., dict[str, Tensor]]:
    """The mean over the tokens that have a teacher."""

    def formula(plays: list[Play]) -> dict[str, Tensor]:
        heard = [t for _, t in trained_tokens(plays) if t.teacher is not None]
        return {name: mean(loss(t) for t in heard)}

    return formula


# -- KD, GKD, G-OPD on distributions, OPSD, TAID --------------------------------------------------


def test_kd_and_exact_on_policy_distillation() -> None:
    check("kd", by_tokens("forward_kl", lambda t: kl(t.log_teacher, t.log_s)))
    check("opd-exact", by_tokens("reverse_kl", lambda t: kl(t.log_s, t.log_teacher)))


@pytest.mark.parametrize("beta", [0.5, 0.1, 0.9])
def test_gkd(beta: float) -> None:
    formula = by_tokens("jsd", lambda t: jsd(t.log_s, t.log_teacher, beta))
    check("gkd", formula, signal={"beta": beta})


def test_gkd_at_the_temperature_of_trl() -> None:
    def loss(t: Token) -> Tensor:
        return jsd(*((p / 0.9).log_softmax(-1) for p in (t.log_s, t.log_teacher)))

    check("gkd", by_tokens("jsd", loss), signal={"temperature": 0.9})


@pytest.mark.parametrize("share", [1.25, 0.4])
def test_exopd_on_whole_distributions(share: float) -> None:
    def loss(t: Token) -> Tensor:
        target = (share * t.log_teacher + (1 - share) * t.log_base).log_softmax(-1)
        return kl(t.log_s, target)

    exact = {"divergence": "reverse_kl", "coupling": "loss", "share": share}
    formula = by_tokens("reverse_kl", loss)
    check("exopd", formula, signal=exact, policy_gradient={"tis_cap": None})


def test_a_truncated_ratio_weighs_distributions_too() -> None:
    def loss(t: Token) -> Tensor:
        return min(math.exp(t.old - t.sampler), 1.1) * kl(t.log_s, t.log_teacher)

    check("opd-exact", by_tokens("reverse_kl", loss), policy_gradient={"tis_cap": 1.1})


def test_opsd() -> None:
    check("opsd", by_tokens("jsd", lambda t: jsd(t.log_s, t.log_teacher)), told="scorer")


def test_opsd_as_the_paper_writes_it_clips_tokens() -> None:
    plays = read(episodes(), "student", "self", "scorer", ())
    heard = [t for p in plays for t in p.tokens if t.teacher is not None]
    clip = 1.01 * statistics.median(kl(t.log_teacher, t.log_s).item() for t in heard)

    def loss(t: Token) -> Tensor:
        return kl(t.log_teacher, t.log_s).clamp_max(clip)

    forward = {"divergence": "forward_kl", "clip": clip}
    check("opsd", by_tokens("forward_kl", loss), told="scorer", signal=forward)


@pytest.mark.parametrize("t", [0.4, 0.7, 1.0])
def test_taid_moves_its_target_with_the_student(t: float) -> None:
    def loss(token: Token) -> Tensor:
        live = token.log_s.detach()
        return kl(((1 - t) * live + t * token.log_teacher).log_softmax(-1), token.log_s)

    axes = get("taid").resolve({})
    check(axes.at({"signal.share": t}), by_tokens("forward_kl", loss))


def test_the_controller_of_taid_over_an_iteration_as_published() -> None:
    controller = Controller(get("taid").resolve({}).schedules["signal.share"])
    assert controller.value(0.0) == 0.4
    controller.observe(2.0)
    controller.observe(1.5)
    assert controller.value(0.0) - 0.4 == pytest.approx(0.00015019, abs=1e-8)
    assert controller.state_dict()["fall"] == pytest.approx(0.0025)


@pytest.mark.parametrize("total", [8, 100_000])
def test_the_controller_of_taid_over_many_iterations(total: int) -> None:
    """A short run follows the linear rise, a long one is ahead of it."""
    controller = Controller(get("taid").resolve({}).schedules["signal.share"])
    losses = [2.0, 1.5, 1.7, 1.0, 0.9, 0.9, 0.4, 0.5]
    t, momentum, before, ahead = 0.4, 0.0, None, 0
    for n, loss in enumerate(losses):
        linear = 0.4 + (1 - 0.4) * n / total
        ahead += t > linear
        t = min(1.0, max(linear, t))
        assert controller.value(n / total) == pytest.approx(t, abs=1e-12)
        controller.observe(loss)
        if before is not None:
            momentum = 0.99 * momentum + 0.01 * (before - loss) / (before + 1e-15)
            t = t + 5e-4 / (1 + math.exp(-momentum)) * (1 - t)
        before = loss
    assert (ahead == 0) == (total == 8)


# -- Skill-SD -------------------------------------------------------------------------------------


@pytest.mark.parametrize("coef", [1e-3, 0.7])
def test_skill_sd(coef: float) -> None:
    def formula(plays: list[Play]) -> dict[str, Tensor]:
        set_gains(plays, lambda p: p.of.score, eps=1e-8)
        tokens = trained_tokens(plays)
        total = torch.zeros((), dtype=torch.float64)
        for _, t in tokens:
            if t.teacher is not None:
                ell, rho = t.s - t.teacher, (t.s - t.old).exp()
                total = total + rho * ((-ell).exp() - 1 + ell)
        gained = (clipped(t.s, t.old, p.extra["gain"], 0.28) for p, t in tokens)
        return {"policy_gradient": mean(gained), "rho_k3": coef * total / len(tokens)}

    check("skill-sd", formula, told="scorer", signal={"coef": coef})


# -- SDPO, SRPO -----------------------------------------------------------------------------------

TOP = {"top_k": 5}


def with_tail(token: Token, k: int = 5) -> Tensor:
    """JSD 0.5 on the student's likeliest tokens and one bucket for the others."""
    said = token.log_s.tolist()
    ids = sorted(range(len(said)), key=lambda i: -said[i])[:k]
    sides = []
    for log_p in (token.log_s, token.log_teacher):
        p = log_p[ids].exp()
        sides.append(torch.cat([p, 1 - p.sum()[None]]).log())
    return jsd(*sides)


def capped(token: Token, cap: float) -> float:
    return min(math.exp(token.s.item() - token.old), cap)


@pytest.mark.parametrize("caps", [(2.0, 2.0), (1.02, 1.1)])
def test_sdpo(caps: tuple[float, float]) -> None:
    cap, sampler = caps

    def loss(t: Token) -> Tensor:
        return min(math.exp(t.old - t.sampler), sampler) * capped(t, cap) * with_tail(t)

    plays = read(episodes(), "student", "self", "scorer", ())
    ratios = [capped(t, math.inf) for p in plays for t in p.tokens]
    assert min(ratios) < 0.98 and max(ratios) > 1.05
    cut = {**TOP, "ratio_cap": cap}
    check(
        "sdpo",
        by_tokens("jsd", loss),
        told="scorer",
        signal=cut,
        policy_gradient={"tis_cap": sampler},
    )


def entropy(log_p: Tensor) -> float:
    return float(-(log_p.exp() * log_p).sum())


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_srpo_routes_weighs_and_shares_one_denominator(beta: float) -> None:
    def formula(plays: list[Play]) -> dict[str, Tensor]:
        set_gains(plays, won)
        routed = {p.of.number for p in plays if not p.of.success and p.of.note is not None}
        weights = [
            math.exp(-beta * entropy(t.log_teacher))
            for p in plays if p.of.number in routed for t in p.tokens
        ]  # fmt: skip
        scale = statistics.fmean(weights)
        total = {name: torch.zeros((), dtype=torch.float64) for name in ("policy_gradient", "jsd")}
        tokens = trained_tokens(plays)
        for p, t in tokens:
            if p.of.number in routed:
                weight = math.exp(-beta * entropy(t.log_teacher)) / scale
                total["jsd"] = total["jsd"] + weight * capped(t, 2.0) * with_tail(t)
            else:
                loss = clipped(t.s, t.old, p.extra["gain"])
                total["policy_gradient"] = total["policy_gradient"] + loss
        return {name: value / len(tokens) for name, value in total.items()}

    rule = {"token": {"beta": beta}}
    check("srpo", formula, told="scorer", signal=TOP, weight=rule)


def test_the_weights_of_srpo_by_their_vector() -> None:
    """V13, of three rows; the others are routed to the reward."""
    axes = get("srpo").resolve({"signal": TOP})
    failed = replace(episodes()[8], group="b")
    table, heads = scored(axes, (episodes()[5], failed))
    mine = table["trajectory"] == 1
    table["entropy/teacher@context"][mine] = torch.tensor([0.5, 1.0, 2.0])
    plan.fill(table, axes, heads=heads)
    wanted = [1.639648, 0.994497, 0.365855]
    assert table["weight/signal"][mine].tolist() == pytest.approx(wanted, abs=1e-6)
    assert not bool(table["weight/signal"][~mine].any())
    assert torch.equal(table["rows/reward"], ~mine)


# -- KEPO, PACED ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("tau", "number"), [(1.0, 1), (0.4, 5), (0.0, 9)])
def test_kepo_distils_what_is_good_enough(tau: float, number: int) -> None:
    assert sum(e.score >= tau for e in episodes()) == number

    def formula(plays: list[Play]) -> dict[str, Tensor]:
        set_gains(plays, won, eps=1e-4)
        tokens = trained_tokens(plays)
        found = {"policy_gradient": mean(clipped(t.s, t.old, p.extra["gain"]) for p, t in tokens)}
        good = [jsd(t.log_s, t.log_teacher) for p, t in tokens if p.of.score >= tau]
        return {**found, "jsd": mean(good) if good else torch.zeros((), dtype=torch.float64)}

    check("kepo", formula, signal={"route": {"threshold": tau}})


def test_the_gate_of_kepo_by_its_vector() -> None:
    """V30: rewards 2, 1, 0.5, 0 of at most 2, tau 1; here all of them are halved."""
    axes = get("kepo").resolve({"signal": {"route": {"threshold": 0.5}}})
    played = [replace(episodes()[n], score=s) for n, s in enumerate((1.0, 0.5, 0.25, 0.0))]
    table, _ = scored(axes, played)
    plan.fill(table, axes)
    assert table["trajectory"][table["rows/kd"]].unique().tolist() == [0, 1]
    assert bool(table["rows/pg"].all())


@pytest.mark.parametrize(("a", "b", "scale"), [(1, 1, "none"), (2, 0.5, "none"), (1, 1, "mean1")])
def test_paced(a: float, b: float, scale: str) -> None:
    def formula(plays: list[Play]) -> dict[str, Tensor]:
        for play in plays:
            won = [p.of.success for p in plays if p.of.group == play.of.group]
            p = sum(won) / len(won)
            play.extra["w"] = p**a * (1 - p) ** b
        every = [p.extra["w"] for p in plays for _ in p.tokens]
        unit = statistics.fmean(every) if scale == "mean1" else 1.0
        tokens = trained_tokens(plays)
        return {
            "forward_kl": mean(p.extra["w"] / unit * kl(t.log_teacher, t.log_s) for p, t in tokens)
        }

    check("paced", formula, task={"a": a, "b": b, "normalise": scale})


# -- REDI, agent-distillation, SFT ----------------------------------------------------------------


def test_redi_over_pairs() -> None:
    """As many failures as successes in either batch, so that the paper's pairs can be made."""
    played = [replace(episodes()[n], number=n, end=end) for n, end in enumerate(
        ("success", "success", "failure", "failure", "success", "success", "failure", "failure")
    )]  # fmt: skip

    def formula(plays: list[Play]) -> dict[str, Tensor]:
        right = [p for p in plays if p.trained and p.of.success]
        wrong = [p for p in plays if p.trained and not p.of.success]
        pairs = [
            -mean(t.s for t in y.tokens) + 0.8 * mean(t.s for t in n.tokens)
            for y, n in zip(right, wrong, strict=True)
        ]
        return {"nll": mean(pairs)}

    check("redi", formula, played=played)


def test_redi_unlearns_nothing_that_a_window_ended() -> None:
    table, _ = scored(get("redi").resolve({}), episodes()[:4])
    plan.fill(table, get("redi").resolve({}))
    found = [float(table["weight/signal"][table["trajectory"] == b][0]) for b in range(4)]
    assert found == pytest.approx([1.0, -0.8, 0.0, 1.0])


def test_the_vector_of_redi() -> None:
    axes = get("redi").resolve({})
    table, _ = scored(axes, (episodes()[0], episodes()[1]))
    plan.fill(table, axes)
    (term,) = plan.terms(axes)
    weights = term.row_weights(table, torch.ones(len(table), dtype=torch.bool))
    normed = table.spread(torch.tensor([-0.5, -0.7]))
    assert float((weights * -normed).sum()) == pytest.approx(-0.06, abs=1e-6)


def test_agent_distillation_learns_clean_successes_and_their_forced_openings() -> None:
    changes = (
        {"forced": 2}, {"end": "success"}, {"end": "success", "verdict": Verdict.MALFORMED},
        {"forced": 2, "end": "failure"}, {}, {"verdict": Verdict.INADMISSIBLE, "forced": 1},
        {"end": "success", "verdict": Verdict.MISSING}, {"end": "success", "score": 0.2}, {},
    )  # fmt: skip
    played = [replace(e, **change) for e, change in zip(episodes(), changes, strict=True)]
    axes = get("agent-distillation").resolve({})
    table, _ = scored(axes, played)
    assert set(table["author"].tolist()) == {Author.ACTOR, Author.FORCED}
    kept = {0, 1, 5, 7}

    def formula(plays: list[Play]) -> dict[str, Tensor]:
        return {"nll": mean(-t.s for p, t in trained_tokens(plays) if p.of.number in kept)}

    check(axes, formula, played=played)


def test_sft_learns_successes() -> None:
    def formula(plays: list[Play]) -> dict[str, Tensor]:
        return {"nll": mean(-t.s for p, t in trained_tokens(plays) if p.of.success)}

    check("sft", formula)


# -- SCOPE ----------------------------------------------------------------------------------------


def branch_weight(play: Play, plays: Sequence[Play], tau: float, sign: float) -> float:
    """PPL^(1 / tau) of the student among successes, PPL^(-1 / tau) of the teacher among failures,
    over their sum in the branch of the group, times their number."""  # fmt: skip
    branch = [p for p in plays if p.of.group == play.of.group and p.of.success == play.of.success]

    def score(p: Play) -> float:
        if play.of.success:
            return math.exp(-statistics.fmean(t.old for t in p.tokens)) ** (sign / tau)
        return math.exp(-statistics.fmean(t.teacher for t in p.tokens)) ** (-1 / tau)

    return len(branch) * score(play) / sum(map(score, branch))


@pytest.mark.parametrize(("tau", "sign"), [(1.0, 1.0), (2.5, 1.0), (1.0, -1.0)])
def test_scope(tau: float, sign: float) -> None:
    def formula(plays: list[Play]) -> dict[str, Tensor]:
        right, wrong = [], []
        for p in plays:
            weight = branch_weight(p, plays, tau, sign)
            for t in p.tokens if p.trained else ():
                if p.of.success:
                    right.append(-weight * t.s)
                else:
                    wrong.append(clipped(t.s, t.old, weight * (t.teacher - t.old)))
        return {"policy_gradient": mean(wrong), "nll/1": mean(right)}

    check("scope", formula, weight={"trajectory": {"tau": tau, "sign": sign}})


@pytest.mark.parametrize(("success", "wanted"), [(True, (1.244919, 0.755081)),
                                                 (False, (0.755081, 1.244919))])  # fmt: skip
def test_the_vector_of_scope(success: bool, wanted: tuple[float, float]) -> None:
    axes = get("scope").resolve({})
    end = "success" if success else "failure"
    table, _ = scored(axes, [replace(e, group="a", end=end) for e in episodes()[:2]])
    for name in ("logp/old", "logp/teacher"):
        table[name] = table.spread(torch.tensor([-1.0, -0.5]))
    plan.fill(table, axes)
    found = [float(table["weight/signal"][table["trajectory"] == b][0]) for b in (0, 1)]
    assert found == pytest.approx(wanted, abs=1e-6)
