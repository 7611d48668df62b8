# Included by the Makefile.
#
#   sudo make install                     install or upgrade; keeps the settings
#   sudo make uninstall [PURGE=1]         PURGE=1 removes the settings as well
#   make install DESTDIR=/tmp/package     install below another directory, to build a package

PREFIX ?= /opt/loyalty-microservice
# For this service only: in the service, this directory contains only the copy of the settings.
SYSCONFDIR ?= /etc/loyalty-microservice
# systemd's directory for units that an administrator installs. /usr/lib belongs to the package
# manager; in /etc/systemd/system an upgrade would overwrite the result of `systemctl edit --full`.
UNITDIR ?= /usr/local/lib/systemd/system
# An absolute path: the first python3 in PATH may be below /home, which the service cannot read.
INSTALL_PYTHON ?= /usr/bin/python3
DESTDIR ?=
PURGE ?=

unit := loyalty-microservice.service
# The same unit as a template, for several shops: @books reads its settings from books.env.
template := loyalty-microservice@.service
checks := loyalty-microservice-status@.timer loyalty-microservice-status@.service \
  loyalty-microservice-alert@.service
units := $(unit) $(template) $(checks)
# This file shows that `make install` created PREFIX, so `make uninstall` may delete files there.
marker := .installed-by-make
running := $(unit) 'loyalty-microservice@*.service' 'loyalty-microservice-status@*.timer'
prefix = $(DESTDIR)$(PREFIX)
settings = $(DESTDIR)$(SYSCONFDIR)/loyalty.env
# Call systemctl only if systemd is running, and if DESTDIR is empty.
systemctl = $(if $(DESTDIR),:,test ! -d /run/systemd/system || systemctl)

.PHONY: install uninstall test-systemd test-container check-prefix

check-prefix:
	@test ! '$(prefix)' -ef . || { echo 'PREFIX=$(PREFIX): this is the source directory'; exit 1; }
	@case '$(PREFIX)' in \
	  /home/*|/root/*|/run/user/*|/tmp/*|/var/tmp/*) \
	    echo 'PREFIX=$(PREFIX): the service cannot read it (ProtectHome, PrivateTmp)'; exit 1;; \
	  *[!A-Za-z0-9/._-]*|[!/]*|/|'') \
	    echo 'PREFIX=$(PREFIX): must be an absolute path of letters, digits and / . _ -'; exit 1;; \
	esac
	@test -z "$$(ls -A '$(prefix)' 2>/dev/null)" || test -e '$(prefix)/$(marker)' || \
	  { echo 'PREFIX=$(PREFIX): the directory is not empty, and make install did not create it'; exit 1; }

# umask: the service runs as a user that does not own these files, and must be able to read them.
install: check-prefix ## install or upgrade the systemd service, as root
	umask 022 && mkdir -p '$(prefix)' '$(DESTDIR)$(UNITDIR)' && touch '$(prefix)/$(marker)'
# The new environment replaces the old one only when it is complete: if pip fails, the old version
# still works. The scripts (pip, activate) contain the temporary path and would not work.
	rm -rf '$(prefix)/venv.new'
	umask 022 && '$(INSTALL_PYTHON)' -m venv '$(prefix)/venv.new'
	umask 022 && '$(prefix)/venv.new/bin/python' -m pip install --quiet \
	  --disable-pip-version-check --require-hashes --requirement requirements.lock
	find '$(prefix)/venv.new/bin' ! -name 'python*' ! -type d -delete
	rm -rf '$(prefix)/venv'
	mv '$(prefix)/venv.new' '$(prefix)/venv'
	rm -rf '$(prefix)/__pycache__' '$(prefix)/loyalty' '$(prefix)/'*.py
	install -m 0644 *.py requirements.lock '$(prefix)'
	find loyalty -name '*.py' -exec install -D -m 0644 {} '$(prefix)/{}' \;
	find '$(prefix)/loyalty' -type d -exec chmod 0755 {} +
	set -e; for unit in $(unit) $(checks); do \
	  sed 's#/opt/loyalty-microservice#$(PREFIX)#g; s#/etc/loyalty-microservice#$(SYSCONFDIR)#g' \
	    "deploy/$$unit" > "$(DESTDIR)$(UNITDIR)/$$unit"; done
# A user for each shop: by default, all instances share one, who could read the settings of each.
	sed -e 's#loyalty\.env#%i.env#g; s#^Description=.*#& (%i)#; s#^SyslogIdentifier=.*#&@%i#' \
	  -e 's#^DynamicUser=yes#&\nUser=loyalty-%i#' \
	  '$(DESTDIR)$(UNITDIR)/$(unit)' > '$(DESTDIR)$(UNITDIR)/$(template)'
	chmod 0644 $(units:%='$(DESTDIR)$(UNITDIR)/%')
	test -d '$(dir $(settings))' || install -d -m 0700 '$(dir $(settings))'
	test -e '$(settings)' || install -m 0600 deploy/loyalty.env '$(settings)'
	$(systemctl) daemon-reload
	@echo
	@echo 'Installed. First installation: the first recount overwrites existing points, so check first.'
	@echo '  1. edit $(SYSCONFDIR)/loyalty.env; MONGODB_URI is required'
	@echo '  2. $(PREFIX)/venv/bin/python $(PREFIX)/loyalty_microservice.py \'
	@echo '       --env-file $(SYSCONFDIR)/loyalty.env --check-config'
	@echo '  3. systemctl enable --now loyalty-microservice'
	@case "$$(readlink -f '$(INSTALL_PYTHON)')" in /home/*|/root/*) \
	  echo 'Warning: INSTALL_PYTHON=$(INSTALL_PYTHON): the service cannot read it (ProtectHome)';; esac
	@echo 'Upgrade: run step 2, then systemctl restart loyalty-microservice'

uninstall: check-prefix ## remove the service; with PURGE=1 its settings as well
	test ! -e '$(DESTDIR)$(UNITDIR)/$(unit)' || \
	  { $(systemctl) stop $(running) && \
	    $(systemctl) disable $(filter-out %-alert@.service %-status@.service,$(units)); }
	rm -f $(units:%='$(DESTDIR)$(UNITDIR)/%')
	for folder in '$(DESTDIR)$(UNITDIR)' '$(dir $(DESTDIR)$(UNITDIR))'; do \
	  test ! -d "$$folder" || rmdir --ignore-fail-on-non-empty "$$folder"; done
	rm -rf '$(prefix)/venv' '$(prefix)/venv.new' '$(prefix)/__pycache__' '$(prefix)/loyalty'
	rm -f '$(prefix)/'*.py '$(prefix)/requirements.lock'
# While there are other files, the marker stays, so that install and uninstall still accept the
# directory.
	test "$$(ls -A '$(prefix)' 2>/dev/null)" != '$(marker)' || rm -r '$(prefix)'
ifeq ($(PURGE),1)
	rm -f '$(dir $(settings))'*.env
	test ! -d '$(dir $(settings))' || rmdir --ignore-fail-on-non-empty '$(dir $(settings))'
	rm -rf $(units:%='$(DESTDIR)/etc/systemd/system/%.d')
endif
	$(systemctl) daemon-reload
ifneq ($(PURGE),1)
	@test ! -e '$(settings)' || echo 'The settings are still in $(SYSCONFDIR); PURGE=1 removes them.'
endif

# These targets run as root. Caches are off, because root would own the cache files in the source
# directory.
test-systemd: $(STAMP) ## run the tests that need root: a real systemd, a full disk
	$(RUN) -B -m pytest -p no:cacheprovider -m machine deploy/test_systemd.py tests $(ARGS)

test-container: $(STAMP) $(VENV)/deploy-tools ## build the image and test it with podman, as root
	$(RUN) -B -m pytest -p no:cacheprovider deploy/test_container.py deploy/test_files.py \
	  deploy/test_dashboard.py $(ARGS)

$(VENV)/deploy-tools: $(STAMP) deploy/requirements-test.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --requirement deploy/requirements-test.txt
	touch $@
