"""A process of its own that reads files, each under a limit on its time, and says what became of it.

Run with paths as arguments, or on lines of the standard input. A line of JSON for each: the path, "read" or "refused"
(a declared error) or anything else that came up, the message, seconds, and the highest memory of the process so far.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

SECONDS = 10  # of the processor, which other processes do not stretch


class TooLongError(BaseException):
    pass


def too_long(*_):
    raise TooLongError


def read(path):
    from diffmem.data import load_images
    from diffmem.models import load

    if path.suffix == ".pkl" or (path.is_dir() and (path / "config.json").exists()):
        load(path)
    else:
        load_images(path, key="test" if "test_batch" in path.name else None)


def outcome(path):
    from diffmem.errors import InputError, MissingExtraError

    started = time.process_time()
    message, what = "", "read"
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        read(path)
    except (InputError, MissingExtraError) as error:
        what, message = "refused", str(error)
        if "\n" in message or len(message) > 1000:
            what = "refused in too many words"
    except TooLongError:
        what = "took too long"
    except Exception as error:
        what, message = type(error).__name__, str(error)[:300]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if executed:
        what, message = "executed", ", ".join(executed)
        executed.clear()
    return {
        "path": str(path),
        "outcome": what,
        "message": message,
        "seconds": time.process_time() - started,
        "memory": peak_memory(),
    }


def peak_memory():
    """Bytes. Where Linux says it, of this program alone: `ru_maxrss` begins with that of whoever started it."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def watch(event, arguments):
    """Python tells this of whatever a file could want to be done."""
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "exec"):
        executed.append(event)
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        executed.append(f"open {arguments[0]} for writing")


executed = []


def main():
    import PIL.Image
    import torch._dynamo  # noqa: F401 (PyTorch's own import when a network is first built on no device)

    import diffmem.data
    import diffmem.models  # noqa: F401 (imports are not counted)

    PIL.Image.init()  # so are those of its formats

    for path in sys.argv[1:2]:
        outcome(Path(path))  # what is imported late is imported now
    sys.addaudithook(watch)
    signal.signal(signal.SIGPROF, too_long)
    for path in sys.argv[1:] or map(str.strip, sys.stdin):
        print(json.dumps(outcome(Path(path))), flush=True)


if __name__ == "__main__":
    main()
