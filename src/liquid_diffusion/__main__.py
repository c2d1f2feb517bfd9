import sys

from liquid_diffusion.cli import main

sys.exit(main())
