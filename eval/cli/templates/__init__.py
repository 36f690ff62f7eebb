"""`decodebench new-arch`: a commented mixer that passes `check`, to start from."""

import re
from pathlib import Path

from archs.errors import UserError
from archs.files import read_text, write

SOURCE = Path(__file__).parent / "new_mixer.py.txt"


def write_template(name: str, folder: Path = Path(), *, force: bool = False) -> Path:
    """Write NAME.py into `folder`. Raises UserError on a bad name or an existing file."""
    name = name.removesuffix(".py")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(f"name '{name}' must be lower-case letters, digits and _, letter first")
    path = folder / f"{name}.py"
    if path.exists() and not force:
        raise UserError(f"'{path}' exists already; choose another name or give --force")
    class_name = "".join(part.capitalize() for part in name.split("_"))
    write(path, read_text(SOURCE).replace("NewMixer", class_name))
    return path
