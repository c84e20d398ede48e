from pygpt.cli import main

raise SystemExit(main())
