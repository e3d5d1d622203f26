"""What `starfish up` tells people to try once the instance serves."""

from __future__ import annotations

from cli.up.options import UpOptions
from cli.up.run_folder import RunFolder


def next_steps(options: UpOptions, folder: RunFolder, url: str, admin_url: str) -> tuple[str, ...]:
    """One line each."""
    name = "" if options.instance == "default" else f" --instance {options.instance}"
    run = "" if folder.is_default else f" --run-dir {options.run_dir}"
    return (
        f"\nServing at {url}/v1 until Ctrl-C. In another terminal:",
        f"  starfish status{name}{run}     what runs where",
        f"  starfish watch{name}{run}      deaths, verdicts and maps as they happen",
        f"  starfish kill 2{name}{run}     kill -9 rank 2, then watch it come back",
        f"  starfish drain 2{name}{run}    take rank 2 out of service, unnoticed by clients",
        f"  in a browser: {admin_url} (the admin API; token: {options.admin_token_file})",
        f"  logs: {folder.log_dir}",
    )
