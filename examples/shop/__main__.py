from examples.shop.main import main

raise SystemExit(main())
