"""Write constraints.txt: every package that any install of the project may bring, with its version.

python tools/lock.py                        after a change of requirements in settings.ini: the
rest stays as it is python tools/lock.py --upgrade-package X    a newer X (any option of `uv pip
compile`)

It is one resolution for Linux and macOS and every supported Python, cut into sections by who
asks for a package."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "constraints.txt"
CUDA = re.compile(r"(cuda|nvidia|triton)\b")
SECTIONS = {  # heading: the extras it adds to those above it
    "What a user installs": [],
    "What editing the notebooks and running the tests needs besides: [dev]": ["dev"],
    "Optional: [genai], [ray]": ["genai", "ray"],
}
HEAD = """\
# Every package that an install may bring, with its version; tools/lock.py makes it of settings.ini.
# A section is what the install named in its heading adds to those above it.
# `-c constraints.txt` takes versions from here, and nothing that is not asked for.
"""


def resolve(extras: list[str], start: Path, *options: str) -> list[str]:
    "The lines of a lock for these extras, near the versions that `start` names"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "lock.txt"
        out.write_text(start.read_text(encoding="utf-8"), encoding="utf-8")
        command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal"]
        command += [
            "--refresh-package",
            "cot-distill",
            "--fork-strategy",
            "fewest",
            "--python-version",
            "3.11",
        ]
        command += ["--no-annotate", "--no-header", "--output-file", str(out), *options]
        command += [word for extra in extras for word in ("--extra", extra)]
        subprocess.run([*command, "setup.py"], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        return [line for line in out.read_text(encoding="utf-8").splitlines() if "==" in line]


def main() -> None:
    every = [extra for extras in SECTIONS.values() for extra in extras]
    whole = resolve(every, LOCK, *sys.argv[1:])
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(whole) + "\n")
        file.flush()
        named, text, asked = set[str](), HEAD, list[str]()
        for heading, extras in SECTIONS.items():
            asked += extras
            wanted = {line.split("==")[0] for line in resolve(asked, Path(file.name))}
            lines = [line for line in whole if line.split("==")[0] in wanted - named]
            named |= wanted
            text += f"\n# {heading}\n" + "".join(f"{x}\n" for x in lines if not CUDA.match(x))
    cuda = "".join(f"{line}\n" for line in whole if CUDA.match(line))
    text += f"\n# What a torch for GPUs brings on Linux; one for processors asks for none\n{cuda}"
    LOCK.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
