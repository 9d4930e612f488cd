"""These tests are of the sanitizer's run: `python tests/sanitize`."""

import sys

collect_ignore_glob = [] if "ttsem" in sys.modules else ["test_*.py"]
