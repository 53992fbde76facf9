from examples.flights.main import main

raise SystemExit(main())
