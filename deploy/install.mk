# Included by the Makefile.
#
#   sudo make install                     also upgrades: settings stay, then systemctl restart
#   sudo make uninstall [PURGE=1]         settings stay, unless PURGE=1
#   make install DESTDIR=/tmp/package     into a folder of its own, as packagers do

PREFIX ?= /opt/loyalty-microservice
SYSCONFDIR ?= /etc/loyalty-microservice
# Where systemd looks for what an administrator installed. Not /usr/lib, which is the package
# manager's, and not /etc/systemd/system: an upgrade would overwrite `systemctl edit --full` there.
UNITDIR ?= /usr/local/lib/systemd/system
# Not just python3: that may be somebody's own below /home, where the service cannot see it.
INSTALL_PYTHON ?= /usr/bin/python3
DESTDIR ?=
PURGE ?=

unit := loyalty-microservice.service
# The same unit for several shops: @books has its settings in books.env.
shops := loyalty-microservice@.service
looks := loyalty-microservice-status@.timer loyalty-microservice-status@.service \
  loyalty-microservice-alert@.service
units := $(unit) $(shops) $(looks)
running := $(unit) 'loyalty-microservice@*.service' 'loyalty-microservice-status@*.timer'
prefix = $(DESTDIR)$(PREFIX)
settings = $(DESTDIR)$(SYSCONFDIR)/loyalty.env
# Speak to systemd only where one runs, and where we install for this very machine.
systemctl = $(if $(DESTDIR),:,test ! -d /run/systemd/system || systemctl)

.PHONY: install uninstall test-systemd test-container check-prefix

check-prefix:
	@test ! '$(prefix)' -ef . || { echo 'PREFIX=$(PREFIX): these are the sources'; exit 1; }
	@case '$(PREFIX)' in \
	  /home/*|/root/*|/run/user/*|/tmp/*|/var/tmp/*) \
	    echo 'PREFIX=$(PREFIX): the service does not see what is there (ProtectHome, PrivateTmp)'; exit 1;; \
	  *[!A-Za-z0-9/._-]*|[!/]*|/|'') \
	    echo 'PREFIX=$(PREFIX): must be an absolute path of letters, digits and / . _ -'; exit 1;; \
	esac

# Whatever the umask: the service runs as a user that owns none of this, and has to read it.
install: check-prefix ## install or upgrade the systemd service, as root
	umask 022 && mkdir -p '$(prefix)' '$(DESTDIR)$(UNITDIR)'
# The new environment is made beside the old one, so that a failure leaves the old one at work.
# Its scripts (pip, activate) hold the path they were made at and would not run from the other.
	rm -rf '$(prefix)/venv.new'
	umask 022 && '$(INSTALL_PYTHON)' -m venv '$(prefix)/venv.new'
	umask 022 && '$(prefix)/venv.new/bin/python' -m pip install --quiet \
	  --disable-pip-version-check --requirement requirements.txt
	find '$(prefix)/venv.new/bin' ! -name 'python*' ! -type d -delete
	rm -rf '$(prefix)/venv'
	mv '$(prefix)/venv.new' '$(prefix)/venv'
	rm -rf '$(prefix)/__pycache__' '$(prefix)/loyalty' '$(prefix)/'*.py
	install -m 0644 *.py requirements.txt '$(prefix)'
	find loyalty -name '*.py' -exec install -D -m 0644 {} '$(prefix)/{}' \;
	find '$(prefix)/loyalty' -type d -exec chmod 0755 {} +
	set -e; for unit in $(unit) $(looks); do \
	  sed 's#/opt/loyalty-microservice#$(PREFIX)#g; s#/etc/loyalty-microservice#$(SYSCONFDIR)#g' \
	    "deploy/$$unit" > "$(DESTDIR)$(UNITDIR)/$$unit"; done
	sed 's#loyalty\.env#%i.env#; s#^Description=.*#& (%i)#; s#^SyslogIdentifier=.*#&@%i#' \
	  '$(DESTDIR)$(UNITDIR)/$(unit)' > '$(DESTDIR)$(UNITDIR)/$(shops)'
	chmod 0644 $(units:%='$(DESTDIR)$(UNITDIR)/%')
	test -d '$(dir $(settings))' || install -d -m 0700 '$(dir $(settings))'
	test -e '$(settings)' || install -m 0600 deploy/loyalty.env '$(settings)'
	$(systemctl) daemon-reload
	@echo
	@echo 'Installed. The settings are in $(SYSCONFDIR)/loyalty.env; MONGODB_URI is required. Then'
	@echo '  first time: systemctl enable --now loyalty-microservice'
	@echo '  an upgrade: systemctl restart loyalty-microservice'

uninstall: check-prefix ## remove the service; with PURGE=1 its settings too
	test ! -e '$(DESTDIR)$(UNITDIR)/$(unit)' || \
	  { $(systemctl) stop $(running) && \
	    $(systemctl) disable $(filter-out %-alert@.service %-status@.service,$(units)); }
	rm -f $(units:%='$(DESTDIR)$(UNITDIR)/%')
	for folder in '$(DESTDIR)$(UNITDIR)' '$(dir $(DESTDIR)$(UNITDIR))'; do \
	  test ! -d "$$folder" || rmdir --ignore-fail-on-non-empty "$$folder"; done
	rm -rf '$(prefix)/venv' '$(prefix)/venv.new' '$(prefix)/__pycache__' '$(prefix)/loyalty'
	rm -f '$(prefix)/'*.py '$(prefix)/requirements.txt'
	test ! -d '$(prefix)' || rmdir --ignore-fail-on-non-empty '$(prefix)'
ifeq ($(PURGE),1)
	rm -f '$(dir $(settings))'*.env
	test ! -d '$(dir $(settings))' || rmdir --ignore-fail-on-non-empty '$(dir $(settings))'
	rm -rf $(units:%='$(DESTDIR)/etc/systemd/system/%.d')
endif
	$(systemctl) daemon-reload
ifneq ($(PURGE),1)
	@test ! -e '$(settings)' || echo 'The settings stay in $(SYSCONFDIR); PURGE=1 removes them too.'
endif

# Root is needed, and what it writes here stays root's: so no caches beside the sources.
test-systemd: $(STAMP) ## the tests that want a machine: a real systemd, a full disk; as root
	$(RUN) -B -m pytest -p no:cacheprovider -m machine deploy/test_systemd.py tests $(ARGS)

test-container: $(STAMP) $(VENV)/deploy-tools ## build the image and try it with podman, as root
	$(RUN) -B -m pytest -p no:cacheprovider deploy/test_container.py deploy/test_files.py $(ARGS)

$(VENV)/deploy-tools: $(STAMP) deploy/requirements-test.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --requirement deploy/requirements-test.txt
	touch $@
