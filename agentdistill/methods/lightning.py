"""Lightning OPD: on-policy distillation from stored rollouts and stored scores (arXiv 2604.13010).

The student's start plays once and the teacher scores once; afterwards only the student is computed:
A_t = log pi_T(stored) - log pi_th, with the ratio anchored at the student of the moment. That the
rollouts age is accepted; the teacher should be the one that the start was tuned on (the paper's
teacher consistency), or a bias stays.
"""

from agentdistill.methods.space import Axes, Method, ScorerAxis

LIGHTNING = Method(
    name="lightning-opd",
    title="Offline on-policy distillation: stored rollouts, stored scores",
    axes=Axes(actor="cached", scorer=ScorerAxis(stored=True)),
    paper="arXiv:2604.13010",
    notes="data: a collect stage that the student's start (init) played.",
)
