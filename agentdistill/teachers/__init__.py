"""What only a teacher is: experts, external models, and views of the student itself.

A teacher scores or demonstrates; weights that run on an engine are an engine's business
(:mod:`agentdistill.engines`), whatever the role.
"""

if __name__ != "agentdistill.teachers":
    raise ImportError("import this package as agentdistill.teachers, not by the top-level link")
