"""What a slot trains in test_trials.py: no training, but all that may become of one."""

import os
import signal
import time


def train(what, tell, stop, crews):
    tell({"kind": "began", "pid": os.getpid()})
    match what:
        case "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raises":
            raise ValueError("boo")
        case "talks":  # so often that a slot is never without news, until it is asked to stop
            while not stop.asked():
                tell({"kind": "epoch"})
                time.sleep(0.05)
            return {"state": "stopped", "reason": stop.why}
    return {"state": "finished", "reason": None}
