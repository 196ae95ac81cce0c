"""``python -m agentdistill.cli``."""

from agentdistill.cli import main

main()
