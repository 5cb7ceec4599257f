"""Runs BFCL's own AST checker in a process of its own: `python -I -S bfcl_process.py WHEEL`; `bfcl.py` starts it.

Without site-packages (-S) it sees the standard library and the wheel, nothing of this package's environment. Of
`model_config`, which imports the clients of all vendors, the checker only looks up whether a model writes _ for . in names
of functions; a table of one entry that says no stands in its place. Line by line on stdin and stdout, JSON:

    {"category", "functions", "calls", "ground_truth"} -> {"valid", "reason"}
"""

import importlib
import json
import sys
import types

MODEL = "pshare"


def main(wheel: str) -> None:
    """Answers every line of stdin until it ends."""
    sys.path.insert(0, wheel)
    table = types.ModuleType("bfcl_eval.constants.model_config")
    vars(table)["MODEL_CONFIG_MAPPING"] = {MODEL: types.SimpleNamespace(underscore_to_dot=False)}
    sys.modules[table.__name__] = table
    checker = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker")
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_checked(checker, json.loads(line))) + "\n")
        sys.stdout.flush()


def _checked(checker: types.ModuleType, question: dict) -> dict:
    try:
        result = checker.ast_checker(
            question["functions"],
            question["calls"],
            question["ground_truth"],
            checker.Language.PYTHON,
            question["category"],
            MODEL,
        )
    except Exception as error:
        # The checker was not written for every shape of arguments that a model may invent.
        return {"valid": False, "reason": f"the checker cannot compare these arguments: {error!r}"}
    return {"valid": result["valid"], "reason": "; ".join(map(str, result["error"]))}


if __name__ == "__main__":
    main(sys.argv[1])
