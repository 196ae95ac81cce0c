"""G-OPD and ExOPD: distil from beyond the teacher (arXiv 2602.12125).

A_t = lambda log pi_T + (1 - lambda) log pi_base - log pi_old: the reward that the teacher's
training implies, scaled against the KL to the base. lambda = 1 is on-policy distillation, whatever
the base; above 1 it extrapolates (ExOPD: 1.25). The base is the student's start, or the teacher
before its own training (stage key ``base``), which the paper calls reward correction.
"""

from agentdistill.methods.space import Axes, Method, PolicyGradientAxis, SignalAxis

EXOPD = Method(
    name="exopd",
    title="On-policy distillation, extrapolated beyond the teacher",
    axes=Axes(
        signal=SignalAxis(share=1.25),
        policy_gradient=PolicyGradientAxis(tis_cap=5.0),
    ),
    paper="arXiv:2602.12125",
    notes="signal.share is lambda. Several teachers by domain are not here.",
)
