"""How a script begins that loads a model where hgpt is not installed."""

WITHOUT_HGPT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hgpt":
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Blocker())
try:
    import hgpt
except ImportError:
    pass
else:
    raise SystemExit("hgpt can be imported: this proves nothing")
"""
