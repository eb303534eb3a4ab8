"""What goes wrong becomes three lines and an exit code: 0 fine, 2 usage or data, 3 checkpoints, 4 numbers,
5 environment (gate, network, disk, memory), 130 Ctrl-C, 143 SIGTERM. A bug keeps its traceback."""
import io
import sys
from collections.abc import Callable

import torch

from minipeso.runs.checkpoints import CheckpointError

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
        full = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # torch's MemoryError on a CPU
        code = 5 if full else next((code for kind, code in EXIT_CODES if isinstance(error, kind)), None)
        if code is None or "--debug" in sys.argv:
            raise
        text = str(error) or repr(error)
        if isinstance(error, (MemoryError, RuntimeError)):
            text = (f"not enough memory\n{text.splitlines()[0]}\nlower --beams (--resume goes on), --batch or --users, "
                    "or use a smaller --base")
        elif isinstance(error, OSError) and error.errno:
            text = f"the system refused to open, read or write\n{error}\ncheck the path, its permissions and the space"
        print(f"\nerror: {text}", file=sys.stderr)
        sys.exit(code)
