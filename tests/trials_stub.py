"""What a slot trains in test_trials.py: no training, but all that may become of one."""

import os
import signal


def train(what, tell, stop, crews):
    tell({"kind": "began", "pid": os.getpid()})
    match what:
        case "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raises":
            raise ValueError("boo")
        case "talks":  # without a pause, until it is asked to stop
            for number in iter(int, 1):
                tell({"kind": "epoch", "number": number})
                if stop.asked():
                    return {"state": "stopped", "reason": stop.why}
    return {"state": "finished", "reason": None}
