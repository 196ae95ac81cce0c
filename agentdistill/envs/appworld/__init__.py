"""AppWorld: everyday apps driven by code, in a virtual environment of its own."""
