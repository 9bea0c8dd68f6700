"""`fastmim doctor`: what this machine will run on, and why."""

import argparse
import json
import signal


def main(arguments: list[str]) -> None:
    from fastmim.engine.doctor import print_report, report

    parser = argparse.ArgumentParser(
        prog="fastmim doctor", description="What this machine will run on, and why."
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `fastmim doctor | head` is no error
    content = report()
    print(json.dumps(content, indent=2)) if args.json else print_report(content)
