"""Prepares the rows of a pipeline ahead of its stages, for example on a machine without a GPU."""

import time

from gemma2_post.data.mixture import load_rows
from gemma2_post.data.prepared import root
from gemma2_post.models.loading import load_config
from gemma2_post.models.tokenizer import load_tokenizer
from gemma2_post.planning.memory import Job
from gemma2_post.stage.disk import size_of
from gemma2_post.stage.errors import located
from gemma2_post.stage.recipe import values_of


def prepare(jobs: list[Job]) -> None:
    """Reads, checks and tokenizes all data of the jobs, unless that was done before; prints a line for each mixture.

    A model that is still to be made has the tokenizer of the model that it is made from.

    Raises:
        UserError: What the stage itself would say about its data.
    """
    tokenizer_of: dict[str, str] = {}
    seen = set()
    for job in [each for each in jobs if not each.command.is_filter]:
        model = str(job.values[job.command.needed_models[0]])
        path = tokenizer_of[str(job.folder)] = tokenizer_of.get(model, model)
        recipe = values_of(job.checked.recipe)
        for key, row_format in job.command.row_formats.items():
            columns = recipe.get("columns") if key in ("datasets", "held_out_datasets") else None
            asked = str((recipe.get(key), row_format, columns, path))
            if not recipe.get(key) or asked in seen:
                continue
            seen.add(asked)
            began = time.monotonic()
            with located(job.config or job.label):
                tokenizer = None if recipe.get("endpoint") else load_tokenizer(path, load_config(path))
                settings = recipe["max_invalid_share"], 0, columns
                rows = load_rows(
                    recipe[key], *settings, row_format=row_format.with_settings(recipe), tokenizer=tokenizer
                )
            print(f"{job.label}: {key}: {len(rows):,} rows in {time.monotonic() - began:.1f} s", flush=True)
    print(f"stages map them from {root()} ({size_of(root()) / 1e9:.2g} GB)")
