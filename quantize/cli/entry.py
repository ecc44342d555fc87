"""edge-quantize: parse the arguments, run the command, report an error in one line.

Exit status: 0 done; 1 the work failed (input, disk); 2 wrong arguments; 130 interrupted. A file that is not complete
never has its final name.
"""

from __future__ import annotations

import sys
from pathlib import Path

from edge_agent.errors import UserError
from quantize.cli import interrupt
from quantize.cli.commands import UsageError
from quantize.cli.parser import make_parser

EXIT_INTERRUPTED = 130


def main() -> None:
    interrupt.install()
    arguments = make_parser().parse_args()
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        _fail(f"interrupted; {_resume_hint(getattr(arguments, 'out', None))}", EXIT_INTERRUPTED)
    except UsageError as error:
        _fail(str(error), error.exit_status)
    except UserError as error:
        _fail(str(error), 1)  # not its own status: here a configuration or a bundle is input like every other file
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename or 'output'}: {error.strerror or error}")


def _fail(line: str, status: int = 1) -> None:
    print(f"edge-quantize: {line}", file=sys.stderr)
    sys.exit(status)


def _resume_hint(out: Path | None) -> str:
    from quantize.build_folder import resumable_bytes

    if out is not None and (resumable_bytes(out) or out.with_name(f".{out.name}.part.npz").exists()):
        return "the same command continues from here"
    return "nothing was left behind"
