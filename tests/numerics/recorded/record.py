"""Record what public implementations compute on random inputs into public.json.gz, next to this.

Only numbers are kept: drawn inputs and their outputs. The functions are taken, by name, out of
checkouts that are given on the command line, and run by themselves; what their modules import
besides torch is not needed::

    for repo in YoungZ365/SOD kolokerk/TCOD lasgroup/SDPO RUCBM/G-OPD; do
        git clone https://github.com/$repo /some/where/$(basename $repo)
    done
    python tests/numerics/recorded/record.py /some/where

The commits are recorded with the numbers. Recorded with torch 2.13.0, Python 3.11.
"""

from __future__ import annotations

import ast
import gzip
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FILES = {
    "SOD": "verl/trainer/ppo/ray_trainer.py",
    "TCOD": "trinity/algorithm/advantage_fn/on_policy_distill_advantage.py",
    "SDPO": "verl/trainer/ppo/core_algos.py",
    "G-OPD": "verl/verl/workers/actor/dp_actor.py",
}
ROWS, LONG, WORDS = 4, 12, 7


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum()


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return masked_sum(values, mask) / mask.sum()


NAMES: dict[str, Any] = {
    "torch": torch,
    "F": F,
    "defaultdict": defaultdict,
    "verl_F": SimpleNamespace(masked_sum=masked_sum, masked_mean=masked_mean),
    "AlgoConfig": SimpleNamespace,
}
"""What the functions find in their modules; two sums are ours."""


class Config(dict[str, Any]):
    """A configuration that is read both ways, and has None for what it lacks."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


def run(nodes: Sequence[ast.stmt], names: dict[str, Any]) -> dict[str, Any]:
    """``names`` after running ``nodes``, with annotations left unread."""
    future = ast.parse("from __future__ import annotations").body
    module = ast.fix_missing_locations(ast.Module([*future, *nodes], []))
    exec(compile(module, "checkout", "exec"), names)
    return names


def tree(root: Path, name: str) -> ast.Module:
    return ast.parse((root / name / FILES[name]).read_text(encoding="utf-8"))


def functions(root: Path, name: str, *wanted: str) -> SimpleNamespace:
    """Functions and methods of a checkout, without decorators."""
    nodes = {n.name: n for n in ast.walk(tree(root, name)) if isinstance(n, ast.FunctionDef)}
    for each in wanted:
        nodes[each].decorator_list = []
    found = run([nodes[each] for each in wanted], dict(NAMES))
    return SimpleNamespace(**{each: found[each] for each in wanted})


def branch(root: Path, name: str, test: str) -> ast.stmt:
    """The first ``if`` of a checkout whose condition is ``test``, cut to its body."""
    whole = tree(root, name)
    found = (n for n in ast.walk(whole) if isinstance(n, ast.If) and ast.unparse(n.test) == test)
    return next(found)


def draw(seed: int, *shape: int) -> Tensor:
    return rounded(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def rounded(numbers: Tensor) -> Tensor:
    """Three decimals: short to write, and written exactly."""
    return (1000 * numbers).round() / 1000


def log_probs(seed: int, scale: int = 1) -> Tensor:
    return -(scale * draw(seed, ROWS, LONG)).abs() - 0.125


def masks() -> Tensor:
    """Runs of ones: ordinary rows, one that begins and ends with ones, one with a single run."""
    patterns = ["001110011011", "110110001111", "000111111000", "011010101100"]
    return torch.tensor([[int(c) for c in pattern] for pattern in patterns])


def sod(root: Path) -> dict[str, Any]:
    """Step weights, and the advantage they are used in."""
    weigh, add = "compute_stepwise_opd_weights", "_apply_token_kl_regularizer"
    theirs = functions(root, "SOD", "_extract_step_boundaries", weigh, add)
    case: dict[str, Any] = {"mask": masks(), "old": log_probs(0), "teacher": log_probs(1, 2)}
    case["teacher"][2, 3:9] = case["old"][2, 3:9]  # a row without any divergence
    first = slice(2, 5)
    case["teacher"][0, first] = case["old"][0, first]  # d_1 = 0
    case["task"] = draw(2, ROWS, 1).expand(ROWS, LONG) * case["mask"]
    case["outputs"] = []
    for delta, coef in ((0.2, 1.0), (0.5, 1.0), (0.2, 0.3)):
        batch = {"advantages": case["task"].clone(), "response_mask": case["mask"]}
        batch |= {"old_log_probs": case["old"], "ref_log_prob": case["teacher"]}
        settings = {"enable": True, "stepwise_enable": True}
        settings |= {"stepwise_delta": delta, "stepwise_opd_coef": coef}
        trainer = SimpleNamespace(_write_stepwise_log=lambda *_: None)
        proto = SimpleNamespace(batch=batch, meta_info={})
        getattr(theirs, add)(trainer, proto, SimpleNamespace(**settings))
        weights, log = getattr(theirs, weigh)(
            case["old"], case["teacher"], case["mask"], 1e-6, delta
        )
        case["outputs"].append(
            {
                "delta": delta,
                "coef": coef,
                "divergences": [row["d_values"] for row in log],
                "steps": [row["boundaries"] for row in log],
                "weights": weights,
                "advantages": proto.batch["advantages"],
            }
        )
    return case


def tcod(root: Path) -> dict[str, Any]:
    """The advantage of a turn per row, some of it without a teacher."""
    theirs = functions(root, "TCOD", "_compute_opd_advantage")
    scored = (draw(5, ROWS, LONG) > -0.5).long()
    case: dict[str, Any] = {"mask": masks(), "scored": scored}
    case |= {"old": log_probs(3), "teacher": log_probs(4, 3), "outputs": []}
    for coef in (1.0, 0.5):
        advantages, metrics = theirs._compute_opd_advantage(
            case["old"], case["teacher"], case["mask"], scored, coef
        )
        case["outputs"].append({"coef": coef, "advantages": advantages, "kl": metrics["kl/mean"]})
    return case


def sdpo(root: Path) -> dict[str, Any]:
    """The loss of self-distillation and its gradient by the student's logits."""
    theirs = functions(root, "SDPO", "agg_loss", "compute_self_distillation_loss")
    student, teacher = 2 * draw(6, ROWS, LONG, WORDS), 2 * draw(7, ROWS, LONG, WORDS)
    token = draw(8, ROWS, LONG, WORDS).argmax(-1)
    case: dict[str, Any] = {"mask": masks(), "student": student, "teacher": teacher}
    logp = student.log_softmax(-1).gather(-1, token[..., None])[..., 0]
    case |= {"token": token, "old": rounded(logp + 0.7 * draw(9, ROWS, LONG))}
    case |= {"told": torch.tensor([1, 0, 1, 1]), "outputs": []}
    for alpha in (0.0, 0.5, 1.0):
        for k, cap, mode in ((3, 2.0, "token-mean"), (None, None, "seq-mean-token-mean")):
            leaf = student.double().requires_grad_()
            mine, its = leaf.log_softmax(-1), teacher.double().log_softmax(-1)
            top = mine.detach().topk(k or WORDS).indices
            settings = Config(full_logit_distillation=True, distillation_topk=k, is_clip=cap)
            loss, _ = theirs.compute_self_distillation_loss(
                mine.gather(-1, token[..., None])[..., 0],
                its.gather(-1, token[..., None])[..., 0],
                case["mask"],
                Config(settings, alpha=alpha, distillation_add_tail=True),
                old_log_probs=case["old"].double(),
                student_all_log_probs=mine,
                teacher_all_log_probs=its,
                student_topk_log_probs=mine.gather(-1, top),
                teacher_topk_log_probs=its.gather(-1, top),
                self_distillation_mask=case["told"],
                loss_agg_mode=mode,
            )
            (gradient,) = torch.autograd.grad(loss, leaf)
            row = {"alpha": alpha, "k": k, "cap": cap, "mode": mode}
            case["outputs"].append({**row, "loss": loss, "gradient": gradient})
    return case


def verl(root: Path) -> dict[str, Any]:
    """The group advantage and the clipped loss, as shipped with SDPO."""
    grpo, ppo = "compute_grpo_outcome_advantage", "compute_policy_loss_vanilla"
    theirs = functions(root, "SDPO", "agg_loss", grpo, ppo)
    mask, group = masks(), [7, 7, 2, 7]
    reward = torch.zeros(ROWS, LONG)
    reward[:, -1] = torch.tensor([1.0, 0.0, 0.5, 0.25])
    case: dict[str, Any] = {"mask": mask, "group": group, "reward": reward.sum(-1), "outputs": []}
    case |= {"old": log_probs(10), "advantages": 2 * draw(12, ROWS, LONG)}
    case["live"] = case["old"] + draw(11, ROWS, LONG)
    every = torch.ones_like(mask)  # so that any place of a row has the advantage itself
    case["grpo"] = {
        normalise: getattr(theirs, grpo)(reward, every, group, 1e-6, normalise == "std")[0][:, 0]
        for normalise in ("std", "none")
    }
    for mode in ("token-mean", "seq-mean-token-mean"):
        leaf = case["live"].clone().requires_grad_()
        settings = Config(
            clip_ratio=0.2, clip_ratio_low=0.2, clip_ratio_high=0.28, clip_ratio_c=3.0
        )
        settings["global_batch_info"] = {}
        values = (case["old"], leaf, case["advantages"], mask, mode, settings)
        loss, _ = getattr(theirs, ppo)(*values)
        (gradient,) = torch.autograd.grad(loss, leaf)
        case["outputs"].append({"mode": mode, "loss": loss, "gradient": gradient})
    return case


def g_opd(root: Path) -> dict[str, Any]:
    """The advantage with a base; it stands in the middle of the actor's update."""
    code = branch(root, "G-OPD", "self.config.policy_loss.only_reverse_kl_advantages")
    case: dict[str, Any] = {"old": log_probs(13), "teacher": log_probs(14, 2), "outputs": []}
    case["base"] = log_probs(15)
    inputs = {"ref_log_prob": case["teacher"], "base_log_prob": case["base"]}
    inputs["base_ref_log_prob"] = case["base"]  # has to be there for one teacher, and is not read
    for share in (0.5, 1.0, 1.25):
        loss = Config(only_reverse_kl_advantages=True, lambda_vals=share)
        actor = SimpleNamespace(config=SimpleNamespace(policy_loss=loss))
        names = {"self": actor, "old_log_prob": case["old"], "model_inputs": inputs}
        found = run([code], {**NAMES, **names})
        case["outputs"].append({"share": share, "advantages": found["advantages"]})
    return case


def plain(value: Any) -> Any:
    """``value`` without tensors, in seven digits; inputs have fewer."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def commit(path: Path) -> str:
    return subprocess.check_output(["git", "-C", path, "rev-parse", "HEAD"], text=True).strip()


def main() -> None:
    """Record everything."""
    root = Path(sys.argv[1])
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "sources": {
            name: {"file": file, "commit": commit(root / name)} for name, file in FILES.items()
        }
    }
    for name, take in (
        ("SOD", sod),
        ("TCOD", tcod),
        ("SDPO", sdpo),
        ("verl", verl),
        ("G-OPD", g_opd),
    ):
        record[name] = plain(take(root))
    content = json.dumps(record, separators=(",", ":"))
    path = Path(__file__).with_name("public.json.gz")
    path.write_bytes(gzip.compress(content.encode(), mtime=0))
    print(f"{path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
