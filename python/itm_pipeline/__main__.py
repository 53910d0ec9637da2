"""`python -m itm_pipeline` is the command `itm`."""

from __future__ import annotations

from itm_pipeline.cli import main

raise SystemExit(main())
