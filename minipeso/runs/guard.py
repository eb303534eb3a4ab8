"""What goes wrong becomes three lines and an exit code: 0 fine, 2 usage or data, 3 checkpoints, 4 numbers,
5 environment (gate, network, disk, memory), 130 Ctrl-C, 143 SIGTERM. A bug keeps its traceback."""
from __future__ import annotations

import io
import sys
from collections.abc import Callable

import torch

from minipeso.runs.disk import CheckpointError

EXIT_CODES = ((FloatingPointError, 4), (FileNotFoundError, 2), (ValueError, 2), (CheckpointError, 3),
              (torch.OutOfMemoryError, 5), (MemoryError, 5), (OSError, 5))


def guard(main: Callable[[], None]) -> None:
    """main(), its failures told as above. With --debug on the command line, a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without a title's letters, or the table's ±
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        code = exit_code(error)
        if code is None or "--debug" in sys.argv:
            raise
        print(f"\nerror: {_three_lines(error)}", file=sys.stderr)
        sys.exit(code)


def exit_code(error: Exception) -> int | None:
    """None: a bug, which keeps its traceback."""
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):  # torch's MemoryError, on a CPU
        return 5
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), None)


def _three_lines(error: Exception) -> str:
    """Ours come in three lines; what the system or torch raises does not."""
    if isinstance(error, torch.OutOfMemoryError):
        first = str(error).splitlines()[0]
        return f"not enough memory on the GPU\n{first}\nlower --batch or --eval-batch; --resume goes on with the latter"
    if isinstance(error, (MemoryError, RuntimeError)):
        return (f"not enough memory\n{(str(error) or repr(error)).splitlines()[0][-150:]}\nlower --batch, --eval-batch, --beams or --users, or use "
                "a smaller --base")
    if isinstance(error, OSError) and error.errno:
        return f"the system refused to open, read or write\n{error}\ncheck the path, its permissions and the space"
    return str(error)
