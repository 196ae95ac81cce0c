"""Environments as gymnasium environments of text; needs gymnasium and numpy only.

Importing this module registers the versioned ids, so that
``gymnasium.make("agentdistill/Sokoban-v0")`` works;
``gymnasium.make("agentdistill.envs:agentdistill/Sokoban-v0")`` works without the import.
"""

if __name__ != "agentdistill.envs":
    raise ImportError("import this package as agentdistill.envs, not through the top-level link")
