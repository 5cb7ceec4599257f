"""BFCL's AST checker as a process: `python -I -S bfcl_process.py WHEEL`, started by `bfcl.py`.

Without site-packages (-S) it imports only the standard library and the wheel. The checker uses `model_config`, which
imports all vendors' clients, only to look up whether a model writes _ for . in function names; a table with one entry
replaces it. JSON lines on stdin and stdout:

    {"category", "functions", "calls", "ground_truth"} -> {"valid", "reason"}
"""

import importlib
import json
import sys
import types

MODEL = "pshare"


def main(wheel: str) -> None:
    """Answers each line of stdin."""
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
        # The checker does not expect all types of arguments that a model may generate.
        return {"valid": False, "reason": f"the checker cannot compare these arguments: {error!r}"}
    return {"valid": result["valid"], "reason": "; ".join(map(str, result["error"]))}


if __name__ == "__main__":
    main(sys.argv[1])
