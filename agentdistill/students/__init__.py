"""What only a student is: how its weights are made or loaded, adapted, saved and published.

How a student acts is a policy, and what it is trained on is a method.
"""

if __name__ != "agentdistill.students":
    raise ImportError("import this package as agentdistill.students, not by the top-level link")
