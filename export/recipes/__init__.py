"""Loads the built-in recipes, or a recipe file."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from satchel.export.config import ExportConfig
from satchel.export.errors import ExportError
from satchel.graphs.quant.recipe import Recipe, RecipeError, parse_recipe

FOLDER = Path(__file__).resolve().parent

TARGET_RECIPES = {("cann", "a16w8"): "a16w8-channel", ("cuda", "int8"): "a16w8"}
"""Recipe overrides, by target and precision, for targets that do not support the precision's default recipe."""


def shipped() -> list[str]:
    """Return the names of the built-in recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def recipe_of(config: ExportConfig) -> Recipe | None:
    """Return the recipe of an export; None if weights stay in float. Quick exports skip smoothing.

    Float weights with an int8 KV cache have a recipe without rules.

    Raises:
        ExportError: The recipe cannot be read.
    """
    if config.quantized:
        recipe = load_recipe(_chosen(config))
        if config.effort == "normal":
            return recipe
        return dataclasses.replace(recipe, transforms=tuple(t for t in recipe.transforms if t != "smooth"))
    return Recipe(config.precision, ()) if config.int8_cache else None


def recipe_file(config: ExportConfig) -> Path | None:
    """Return the recipe file of an export; None if weights stay in float."""
    return _path(_chosen(config)) if config.quantized else None


def _chosen(config: ExportConfig) -> str | Path:
    """Return the recipe that the user chose, or the default for the target and precision."""
    default = TARGET_RECIPES.get((config.target, config.precision), config.precision)
    return default if config.recipe is None else config.recipe


def load_recipe(name: str | Path) -> Recipe:
    """Load a recipe from a TOML file, or a built-in recipe by name.

    Raises:
        ExportError: The file does not exist, or is not a recipe.
    """
    path = _path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ExportError(
            f"--recipe {name}: cannot be read ({error.strerror}): pass a TOML file, or one of {', '.join(shipped())}"
        ) from None
    except UnicodeDecodeError as error:
        raise ExportError(f"--recipe {name}: not UTF-8 at byte {error.start}: pass a TOML file") from None
    try:
        return parse_recipe(text, path.stem)
    except RecipeError as error:
        raise ExportError(f"--recipe {name}: {error}") from None


def _path(name: str | Path) -> Path:
    path = Path(name)
    return FOLDER / f"{name}.toml" if not path.is_file() and (FOLDER / f"{name}.toml").is_file() else path
