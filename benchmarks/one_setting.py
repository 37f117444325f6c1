"""The dev score of more settings of a recipe's method, each trained as `reftlens run … --search` trains its nine."""

import argparse
import json
from pathlib import Path

from reftlens.experiments import RECIPES, Scope
from reftlens.experiments.runs.tuning import STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("method")
    parser.add_argument("setting", type=json.loads, nargs="+", help="""JSON, such as '{"lr": 0.03}'""")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--part", help="default: the first of the recipe")
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    recipe = RECIPES[options.recipe]
    subject = recipe.subject(options.model, options.dtype)
    scope = Scope(options.data, options.part and (options.part,), steps=STEPS)
    for setting in options.setting:
        trial = recipe.trial(recipe.parts(scope)[0], options.method, 0, subject, scope, setting)
        trial.fit(None, progress=False)
        print(f"{options.method} {setting}: {trial.dev_score():.3f}", flush=True)


if __name__ == "__main__":
    main()
