"""Environments as gymnasium environments of text; needs gymnasium and numpy only.

Importing this module registers the versioned ids, so that
``gymnasium.make("agentdistill/Sokoban-v0")`` works;
``gymnasium.make("agentdistill.envs:agentdistill/Sokoban-v0")`` works without the import.
Registration names an entry point and loads nothing; the environment's code is imported by ``make``.
"""

if __name__ != "agentdistill.envs":
    raise ImportError("import this package as agentdistill.envs, not through the top-level link")

from gymnasium.envs.registration import register

ENTRY_POINTS = {
    "agentdistill/ALFWorld-v0": "agentdistill.envs.alfworld.env:ALFWorldEnv",
    "agentdistill/AppWorld-v0": "agentdistill.envs.appworld.env:AppWorldEnv",
    "agentdistill/Lockroom-v0": "agentdistill.envs.lockroom:LockroomEnv",
    "agentdistill/ScienceWorld-v0": "agentdistill.envs.scienceworld.env:ScienceWorldEnv",
    "agentdistill/Sokoban-v0": "agentdistill.envs.sokoban.env:SokobanEnv",
    "agentdistill/WebShop-v0": "agentdistill.envs.webshop.env:WebShopEnv",
}
"""Environment id → where its class is."""

for _id, _entry_point in ENTRY_POINTS.items():
    register(id=_id, entry_point=_entry_point)
