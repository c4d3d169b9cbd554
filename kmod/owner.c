// SPDX-License-Identifier: GPL-2.0-only
/*
 * The owner table: socket cookie -> the processes that hold the socket, the
 * one that used it last, and the one that made it.
 *
 * Rules, each measured on real traffic:
 * - the last process that used a socket and still holds it owns its packets;
 * - a socket not accepted yet belongs to its listener's owner;
 * - fork() makes the child a holder; closing the last descriptor ends a hold,
 *   and then the latest of the remaining holders owns the socket;
 * - receiving a descriptor (SCM_RIGHTS, pidfd_getfd) is a use;
 * - who does not hold a socket does not use it, whatever runs in its context;
 * - an entry outlives its socket: TIME_WAIT and orphans still send.
 */
#include <linux/hash.h>
#include <linux/magic.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/rculist.h>
#include <linux/slab.h>
#include <linux/sock_diag.h>
#include <linux/tcp.h>
#include <linux/workqueue.h>
#include <net/tcp.h>

#include "compat.h"
#include "owner.h"
#include "probes.h"

#define OWNER_LOCKS	256
#define OWNER_KEEP	(2 * HZ)	/* what waited on its way */
/* FIN_WAIT2 and then TIME_WAIT, 60 s each, and some; a place in a listener's queue */
#define OWNER_KEEP_WAIT	(130 * HZ)
#define OWNER_KEEP_MIN	(5 * HZ)	/* when either table is nearly full */
#define OWNER_KEEP_BLIND (600 * HZ)	/* unused, when no probe tells of its end */
#define OWNER_KEEP_IDLE	(600 * HZ)	/* held by nobody known, unused, its end not told */

static unsigned int max_sockets = 262144;
module_param(max_sockets, uint, 0444);
MODULE_PARM_DESC(max_sockets, "sockets in the owner table at most (default 262144)");

static struct hlist_head *owner_cookies;
static struct hlist_head *owner_inodes;
static unsigned int owner_bits;

/*
 * Guard both indices' insertion and removal (an inode's bucket by the lock of
 * its own hash) and each owner's holds, user and nholders. Taken from probe
 * handlers in process context with interrupts possibly off, from the packet
 * hooks (softirq) and from the collector: irqsave. A cookie lock may be held
 * when an inode lock is taken, never the reverse.
 */
static raw_spinlock_t owner_locks[OWNER_LOCKS];
static raw_spinlock_t owner_inode_locks[OWNER_LOCKS];

static atomic_t owner_used;
static atomic64_t owner_full;
static struct kmem_cache *owner_cache;
static struct kmem_cache *owner_hold_cache;
static void owner_collect(struct work_struct *work);
static DECLARE_DELAYED_WORK(owner_collector, owner_collect);

static struct hlist_head *owner_bucket(u64 cookie)
{
	return &owner_cookies[hash_64(cookie, owner_bits)];
}

static raw_spinlock_t *owner_lock(u64 cookie)
{
	return &owner_locks[hash_64(cookie, owner_bits) % OWNER_LOCKS];
}

/**
 * sniffer_owner_wants - is this a socket that the table is about?
 * @sk: any full socket
 *
 * Return: true for TCP, UDP and MPTCP sockets of user space.
 */
bool sniffer_owner_wants(const struct sock *sk)
{
	if (sk->sk_family != AF_INET && sk->sk_family != AF_INET6)
		return false;
	if (sk->sk_kern_sock)
		return false;
	return sk->sk_protocol == IPPROTO_TCP || sk->sk_protocol == IPPROTO_UDP ||
	       sk->sk_protocol == IPPROTO_MPTCP || sk->sk_type == SOCK_RAW;
}

/**
 * sniffer_owner_cookie - a socket's cookie, generated if it has none
 * @sk: any socket, also a request or TIME_WAIT one
 */
u64 sniffer_owner_cookie(struct sock *sk)
{
	u64 cookie = atomic64_read(&sk->sk_cookie);
	u32 halves[2];

	if (likely(cookie))
		return cookie;
	sock_diag_save_cookie(sk, halves);
	return (u64)halves[1] << 32 | halves[0];
}

/**
 * sniffer_owner_find - look a socket up
 * @cookie: socket cookie
 *
 * Return: the entry or NULL; valid in the caller's RCU section.
 */
struct sniffer_owner *sniffer_owner_find(u64 cookie)
{
	struct sniffer_owner *owner;

	hlist_for_each_entry_rcu(owner, owner_bucket(cookie), by_cookie)
		if (owner->cookie == cookie)
			return owner;
	return NULL;
}

/**
 * sniffer_owner_find_inode - look a socket up by inode
 * @inode: socket inode, not 0
 *
 * MPTCP subflows share the inode of their parent, not its cookie.
 *
 * Return: the entry or NULL; valid in the caller's RCU section.
 */
struct sniffer_owner *sniffer_owner_find_inode(u64 inode)
{
	struct sniffer_owner *owner;

	hlist_for_each_entry_rcu(owner, &owner_inodes[hash_64(inode, owner_bits)], by_inode)
		if (READ_ONCE(owner->inode) == inode && !READ_ONCE(owner->dead))
			return owner;
	return NULL;
}

static void owner_index_inode(struct sniffer_owner *owner, u64 inode)
{
	raw_spinlock_t *lock;
	unsigned long flags;

	if (!inode || owner->inode)
		return;
	WRITE_ONCE(owner->inode, inode);
	lock = &owner_inode_locks[hash_64(inode, owner_bits) % OWNER_LOCKS];
	raw_spin_lock_irqsave(lock, flags);
	hlist_add_head_rcu(&owner->by_inode, &owner_inodes[hash_64(inode, owner_bits)]);
	raw_spin_unlock_irqrestore(lock, flags);
}

static void owner_unindex_inode(struct sniffer_owner *owner)
{
	raw_spinlock_t *lock;
	unsigned long flags;

	if (!owner->inode)
		return;
	lock = &owner_inode_locks[hash_64(owner->inode, owner_bits) % OWNER_LOCKS];
	raw_spin_lock_irqsave(lock, flags);
	hlist_del_rcu(&owner->by_inode);
	raw_spin_unlock_irqrestore(lock, flags);
}

static void owner_note_address(struct sniffer_owner *owner, const struct sock *sk)
{
	owner->port = inet_sk(sk)->inet_num;
	if (sk->sk_family == AF_INET)
		memcpy(owner->addr, &inet_sk(sk)->inet_rcv_saddr, 4);
#if IS_ENABLED(CONFIG_IPV6)
	else
		memcpy(owner->addr, &sk->sk_v6_rcv_saddr, 16);
#endif
}

static struct sniffer_owner *owner_alloc(struct sock *sk, u64 cookie)
{
	struct sniffer_owner *owner;

	if (atomic_read(&owner_used) >= max_sockets) {
		atomic64_inc(&owner_full);
		return NULL;
	}
	owner = kmem_cache_zalloc(owner_cache, GFP_ATOMIC | __GFP_NOWARN);
	if (!owner) {
		atomic64_inc(&owner_full);
		return NULL;
	}
	owner->cookie = cookie;
	owner->netns = sock_net(sk)->ns.inum;
	owner->family = sk->sk_family;
	/* a request socket, TCP's only kind that is not full, has no sk_protocol */
	owner->proto = sk_fullsock(sk) && sk->sk_protocol == IPPROTO_UDP ? IPPROTO_UDP :
									   IPPROTO_TCP;
	return owner;
}

/* Under the cookie's lock. */
static void owner_insert(struct sniffer_owner *fresh)
{
	hlist_add_head_rcu(&fresh->by_cookie, owner_bucket(fresh->cookie));
	atomic_inc(&owner_used);
}

/* Under the cookie's lock. Takes over no reference. */
static void owner_set_user(struct sniffer_owner *owner, struct sniffer_proc *proc)
{
	struct sniffer_proc *old = rcu_dereference_protected(owner->user, true);

	/* one that was only found under RCU may be on its way out */
	if (old == proc || !refcount_inc_not_zero(&proc->refs))
		return;
	rcu_assign_pointer(owner->user, proc);
	sniffer_process_put(old);
}

/* Under the cookie's lock. */
static struct sniffer_hold *owner_hold_of(struct sniffer_owner *owner,
					  const struct sniffer_proc *proc)
{
	struct sniffer_hold *hold;

	for (hold = owner->holds; hold; hold = hold->next)
		if (hold->proc == proc)
			return hold;
	return NULL;
}

/* Under the cookie's lock. */
static void owner_add_hold(struct sniffer_owner *owner, struct sniffer_proc *proc, u32 fds)
{
	struct sniffer_hold *hold;

	hold = kmem_cache_alloc(owner_hold_cache, GFP_ATOMIC | __GFP_NOWARN);
	if (!hold) {
		atomic64_inc(&owner_full);
		return;
	}
	refcount_inc(&proc->refs);
	hold->proc = proc;
	hold->fds = fds;
	hold->next = owner->holds;
	owner->holds = hold;
	WRITE_ONCE(owner->nholders, owner->nholders + 1);
}

/* Under the cookie's lock. */
static void owner_drop_hold(struct sniffer_owner *owner, struct sniffer_hold *hold)
{
	struct sniffer_hold **link = &owner->holds;
	bool used = rcu_dereference_protected(owner->user, true) == hold->proc;

	while (*link != hold)
		link = &(*link)->next;
	*link = hold->next;
	WRITE_ONCE(owner->nholders, owner->nholders - 1);
	if (used && owner->holds) {
		owner_set_user(owner, owner->holds->proc);
		WRITE_ONCE(owner->tid, 0);
		WRITE_ONCE(owner->flags, owner->flags | SNIFFER_F_INHERITED);
	}
	owner->seen = jiffies;
	sniffer_process_put(hold->proc);
	kmem_cache_free(owner_hold_cache, hold);
}

/*
 * @proc (of @task) holds @sk now, and is its user if @use. The socket's
 * creator where it is new, or was not accepted so far.
 */
static void owner_touch(struct sock *sk, u64 inode, struct sniffer_proc *proc,
			struct task_struct *task, u32 fds, u16 set, bool use)
{
	u64 cookie = sniffer_owner_cookie(sk);
	raw_spinlock_t *lock = owner_lock(cookie);
	struct sniffer_owner *owner, *known, *fresh = NULL;
	struct sniffer_hold *hold;
	unsigned long flags;
	bool seed = set & SNIFFER_F_SEEDED;
	bool alone;

	rcu_read_lock();
	if ((use || seed) && !sniffer_owner_find(cookie))
		fresh = owner_alloc(sk, cookie);
	raw_spin_lock_irqsave(lock, flags);
	owner = sniffer_owner_find(cookie);
	/* a copy of what nobody knows tells nothing of its owner */
	if (!owner && !fresh)
		goto out;
	known = owner;
	if (!known)
		owner = fresh;
	if (owner->via || (!known && !(set & (SNIFFER_F_SEEDED | SNIFFER_F_INHERITED)))) {
		owner->creator = proc->tgid;
		owner->creator_start = proc->start_ns;
	}
	owner_note_address(owner, sk);
	owner->seen = jiffies;
	/* until one is seen to use it, the youngest of those who had it at load may be its user */
	if (seed)
		use = !owner->tid;
	alone = !owner->nholders;
	hold = owner_hold_of(owner, proc);
	if (!hold)
		owner_add_hold(owner, proc, fds);
	else if (set)
		hold->fds += fds;
	if (use || alone || !rcu_access_pointer(owner->user)) {
		u16 keep = owner->flags & ~SNIFFER_F_INHERITED;

		if (set)
			WRITE_ONCE(owner->flags, keep | set);
		owner_set_user(owner, proc);
		WRITE_ONCE(owner->tid, seed ? 0 : task->pid);
	}
	/*
	 * The hooks read without the lock: only now that there is a user may
	 * they find the entry, or stop asking the listener.
	 */
	if (owner->via) {
		WRITE_ONCE(owner->dead, 0);
		smp_store_release(&owner->via, 0);	/* pairs with hooks.c */
	}
	if (!known) {
		owner_insert(owner);
		fresh = NULL;
	}
	owner_index_inode(owner, inode);
out:
	raw_spin_unlock_irqrestore(lock, flags);
	rcu_read_unlock();
	if (fresh)
		kmem_cache_free(owner_cache, fresh);
}

/* How often @file stands in @files, whose holder is current or locked. Compares only. */
static u32 owner_count_fds(const struct file *file, struct files_struct *files)
{
	struct fdtable *fdt;
	unsigned int fd;
	u32 count = 0;

	if (!files)
		return 0;
	rcu_read_lock();
	fdt = files_fdtable(files);
	for_each_set_bit(fd, fdt->open_fds, fdt->max_fds)
		if (rcu_access_pointer(fdt->fd[fd]) == file)
			count++;
	rcu_read_unlock();
	return count;
}

/* Kernel threads and io_uring's helpers: only the latter act for a process. */
static bool owner_is_process(const struct task_struct *task)
{
	return !(task->flags & PF_KTHREAD);
}

/*
 * May current, which did not use @owner's socket last, be its user now? It must
 * hold it: be known to, or have it in its descriptor table, or in an io_uring
 * where @called; if nobody knows the socket, to be closing it will do. Other
 * people's packets are sent in a process's context as well, and the kernel calls
 * for their sockets: for those that a firewall's daemon has judged (NFQUEUE), for
 * a block device whose socket was handed to it (NBD), for what waited while a
 * process only looked at the socket (ss), for the end of one that it let go of last.
 */
static bool owner_may_use(struct sniffer_owner *owner, struct sock *sk, bool called)
{
	struct socket *sock = READ_ONCE(sk->sk_socket);
	const struct sniffer_proc *proc = sniffer_process_find(current);
	raw_spinlock_t *lock = owner ? owner_lock(owner->cookie) : NULL;
	struct file *file = sock ? READ_ONCE(sock->file) : NULL;
	unsigned long flags;
	bool held = false;

	if (owner && proc) {
		raw_spin_lock_irqsave(lock, flags);
		held = owner_hold_of(owner, proc);
		raw_spin_unlock_irqrestore(lock, flags);
	}
	if (held || !sniffer_probes_alive())
		return true;
	/* a task that must not wait for memory does block I/O, for whoever wants the disk */
	called &= !(current->flags & PF_MEMALLOC);
	/* what a full table has not taken is not looked for in descriptor tables, packet by packet */
	if (called && (sniffer_has_uring(current) || (!owner && sniffer_owner_full())))
		return true;
	return file && (owner_count_fds(file, current->files) || (!owner && !file_count(file)));
}

/*
 * Is current at work on the MPTCP socket whose subflow @sk is? `ip mptcp` opens
 * and closes other people's subflows, and sends on what waits in them.
 */
static bool owner_uses_parent(struct sock *sk)
{
	struct sniffer_owner *owner = NULL;
	struct sniffer_proc *user = NULL;
	bool uses;
	u64 inode;

	rcu_read_lock();
	inode = sniffer_owner_inode(sk);
	if (inode)
		owner = sniffer_owner_find_inode(inode);
	if (owner)
		user = rcu_dereference(owner->user);
	uses = (user && sniffer_process_is(user, current)) || owner_may_use(owner, sk, false);
	rcu_read_unlock();
	return uses;
}

/**
 * sniffer_owner_use - the current process uses a socket, or seems to
 * @sk: full socket; from a probe or from LOCAL_OUT in trusted context
 * @called: from a probe: current has called for this very socket
 *
 * Return: false when the use is another one's.
 */
bool sniffer_owner_use(struct sock *sk, bool called)
{
	const struct socket *sock = READ_ONCE(sk->sk_socket);
	u64 cookie = atomic64_read(&sk->sk_cookie);
	struct sniffer_owner *owner;
	struct sniffer_proc *proc;

	if (!owner_is_process(current))
		return true;
	if (!sniffer_owner_wants(sk))
		return called || owner_uses_parent(sk);
	/* without a file it is the kernel's, which only made it here (nvmet) */
	if (sock && !READ_ONCE(sock->file))
		return false;

	/* Nearly always it is the one who used it last: then only read. */
	rcu_read_lock();
	owner = cookie ? sniffer_owner_find(cookie) : NULL;
	proc = owner ? rcu_dereference(owner->user) : NULL;
	if (proc && !owner->via && sniffer_process_is(proc, current)) {
		/* its own end of a socket that it has closed: no use of it any more */
		if (!called && !READ_ONCE(owner->nholders)) {
			rcu_read_unlock();
			return true;
		}
		if (owner->port == inet_sk(sk)->inet_num && READ_ONCE(owner->nholders)) {
			if (READ_ONCE(owner->tid) != current->pid)
				WRITE_ONCE(owner->tid, current->pid);
			if (unlikely(!sniffer_probes_alive()))
				WRITE_ONCE(owner->seen, jiffies);
			sniffer_process_refresh(proc);
			rcu_read_unlock();
			return true;
		}
	} else if (!owner_may_use(owner, sk, called)) {
		rcu_read_unlock();
		return false;
	}
	rcu_read_unlock();

	proc = sniffer_process_get(current);
	if (!proc) {
		atomic64_inc(&owner_full);
		return true;
	}
	sniffer_process_refresh(proc);
	rcu_read_lock();
	owner_touch(sk, sniffer_owner_inode(sk), proc, current, 1, 0, true);
	rcu_read_unlock();
	sniffer_process_put(proc);
	return true;
}

/**
 * sniffer_owner_create - the current process made or accepted a socket
 * @sk: full socket
 * @inode: its inode; sk_socket may not point to it yet
 */
void sniffer_owner_create(struct sock *sk, u64 inode)
{
	struct sniffer_proc *proc;

	if (!sniffer_owner_wants(sk) || !owner_is_process(current))
		return;
	proc = sniffer_process_get(current);
	if (!proc) {
		atomic64_inc(&owner_full);
		return;
	}
	sniffer_process_refresh(proc);
	owner_touch(sk, inode, proc, current, 1, 0, true);
	sniffer_process_put(proc);
}

/**
 * sniffer_owner_receive - the current process got a descriptor of a socket
 * @sk: full socket
 */
void sniffer_owner_receive(struct sock *sk)
{
	struct sniffer_proc *proc;

	if (!sniffer_owner_wants(sk) || !owner_is_process(current))
		return;
	proc = sniffer_process_get(current);
	if (!proc) {
		atomic64_inc(&owner_full);
		return;
	}
	rcu_read_lock();
	owner_touch(sk, sniffer_owner_inode(sk), proc, current, 1, SNIFFER_F_INHERITED, true);
	rcu_read_unlock();
	sniffer_process_put(proc);
}

/**
 * sniffer_owner_refer - a socket's packets belong to another socket's owner
 * @sk: request socket whose handshake this packet completes, or MPTCP subflow
 * @via: cookie of the listener or of the MPTCP parent, which is in the table
 * @how: SNIFFER_HOW_LISTENER or SNIFFER_HOW_INODE
 *
 * The child of a request takes its cookie over, and with it this entry. A SYN
 * alone makes none, so that a flood of them cannot fill the table.
 */
void sniffer_owner_refer(struct sock *sk, u64 via, u8 how)
{
	u64 cookie = sniffer_owner_cookie(sk);
	struct sniffer_owner *owner, *fresh = NULL;
	raw_spinlock_t *lock = owner_lock(cookie);
	unsigned long flags;

	owner = sniffer_owner_find(cookie);
	if (owner && (!READ_ONCE(owner->via) || READ_ONCE(owner->via_how) == how))
		return;
	if (!owner)
		fresh = owner_alloc(sk, cookie);
	raw_spin_lock_irqsave(lock, flags);
	owner = sniffer_owner_find(cookie);
	if (!owner && fresh) {
		owner = fresh;
		fresh = NULL;
		owner->via = via;
		owner->via_how = how;
		/* such sockets end unseen: forget it in time unless it is accepted */
		owner->dead = jiffies | 1;
		owner_insert(owner);
	} else if (owner && owner->via) {
		WRITE_ONCE(owner->via, via);
		WRITE_ONCE(owner->via_how, how);
		WRITE_ONCE(owner->dead, jiffies | 1);
	}
	raw_spin_unlock_irqrestore(lock, flags);
	if (fresh)
		kmem_cache_free(owner_cache, fresh);
}

/* The socket behind a file, or NULL; touches nothing but the inode of others. */
static struct sock *owner_file_sock(struct file *file)
{
	struct inode *inode = file_inode(file);
	struct sock *sk;

	if (inode->i_sb->s_magic != SOCKFS_MAGIC)
		return NULL;
	sk = READ_ONCE(SOCKET_I(inode)->sk);
	return sk && sniffer_owner_wants(sk) ? sk : NULL;
}

/*
 * The files of a table that nobody else changes (a child that does not run
 * yet), or whose file_lock the caller holds.
 */
static void owner_walk_files(struct files_struct *files, struct task_struct *task, u16 set)
{
	struct sniffer_proc *proc = NULL;
	struct fdtable *fdt;
	unsigned int fd;

	rcu_read_lock();
	fdt = files_fdtable(files);
	for_each_set_bit(fd, fdt->open_fds, fdt->max_fds) {
		struct file *file = rcu_dereference(fdt->fd[fd]);
		struct sock *sk = file ? owner_file_sock(file) : NULL;

		if (!sk)
			continue;
		if (!proc)
			proc = sniffer_process_get(task);
		if (!proc) {
			atomic64_inc(&owner_full);
			break;
		}
		owner_touch(sk, file_inode(file)->i_ino, proc, task, 1, set, false);
	}
	rcu_read_unlock();
	sniffer_process_put(proc);
}

/**
 * sniffer_owner_fork - a child got copies of its parent's descriptors
 * @child: does not run yet
 *
 * The walk takes no lock but those of the sockets it meets: nobody else can
 * change the child's table, and it keeps its files. Where closes cannot be seen
 * the child would stay a holder for ever: then it is not made one.
 */
void sniffer_owner_fork(struct task_struct *child)
{
	if (!child->files || child->files == current->files || child->flags & PF_KTHREAD ||
	    !sniffer_probes_alive())
		return;
	owner_walk_files(child->files, child, SNIFFER_F_INHERITED);
}

/**
 * sniffer_owner_exec - a process has a descriptor table of its own, at the latest now
 * @task: current, which nobody shares the table with
 *
 * Sharing one with another process (clone() with CLONE_FILES) it held nothing
 * itself. Else its holds are known, and nothing changes.
 */
void sniffer_owner_exec(struct task_struct *task)
{
	if (task->files && sniffer_probes_alive())
		owner_walk_files(task->files, task, 0);
}

/* Another process with this very table (clone() with CLONE_FILES), or NULL; under RCU. */
static struct task_struct *owner_sharer(const struct files_struct *files,
					const struct task_struct *task)
{
	struct task_struct *other;

	for_each_process(other)
		if (READ_ONCE(other->files) == files && other->tgid != task->tgid)
			return other;
	return NULL;
}

/* What @from holds of @owner is held by @to from now on. */
static void owner_pass_on(struct sniffer_owner *owner, const struct sniffer_proc *from,
			  struct sniffer_proc *to)
{
	raw_spinlock_t *lock = owner_lock(owner->cookie);
	struct sniffer_hold *hold;
	unsigned long flags;

	raw_spin_lock_irqsave(lock, flags);
	/* the collector may have removed it meanwhile, its holds with it */
	hold = owner_hold_of(owner, from);
	if (hold) {
		if (!owner_hold_of(owner, to))
			owner_add_hold(owner, to, hold->fds);
		owner_drop_hold(owner, hold);
	}
	raw_spin_unlock_irqrestore(lock, flags);
}

/**
 * sniffer_owner_leave - a process ends while another one shares its descriptor table
 * @task: current, the last thread of its process, before exit_files()
 *
 * No close will tell, since the table lives on: what this process held, the
 * other holds. Its remaining threads count as users of the table too, so the
 * walk may be for nothing: it looks at every process, but touches none.
 */
void sniffer_owner_leave(struct task_struct *task)
{
	struct files_struct *files = task->files;
	struct sniffer_proc *from, *to = NULL;
	struct task_struct *other;
	struct fdtable *fdt;
	unsigned int fd;

	if (!files || atomic_read(&files->count) < 2)
		return;
	rcu_read_lock();
	from = sniffer_process_find(task);
	other = from ? owner_sharer(files, task) : NULL;
	if (!other)
		goto out;
	task_lock(other);	/* as sniffer_process_get() wants it */
	if (other->files == files)
		to = sniffer_process_get(other);
	task_unlock(other);
	if (!to)
		goto out;
	/* keeps the files in the table, hence alive */
	spin_lock(&files->file_lock);
	fdt = files_fdtable(files);
	for_each_set_bit(fd, fdt->open_fds, fdt->max_fds) {
		struct file *file = rcu_dereference(fdt->fd[fd]);
		struct sock *sk = file ? owner_file_sock(file) : NULL;
		struct sniffer_owner *owner;

		owner = sk ? sniffer_owner_find(atomic64_read(&sk->sk_cookie)) : NULL;
		if (owner)
			owner_pass_on(owner, from, to);
	}
	spin_unlock(&files->file_lock);
	sniffer_process_put(to);
out:
	rcu_read_unlock();
}

/* How often @file stands in the tables of the current process. */
static u32 owner_count_all_fds(const struct file *file)
{
	u32 count = owner_count_fds(file, current->files);
	struct task_struct *task;

	/* A thread can have one of its own: unshare(CLONE_FILES). */
	rcu_read_lock();
	for_each_thread(current, task) {
		if (READ_ONCE(task->files) == current->files)
			continue;
		task_lock(task);	/* keeps its table from exit_files(); process context */
		if (task->files && task->files != current->files)
			count += owner_count_fds(file, task->files);
		task_unlock(task);
	}
	rcu_read_unlock();
	return count;
}

/**
 * sniffer_owner_close - the current process closed a descriptor
 * @file: any file, already out of the table, not freed yet
 *
 * Our own counts can miss dup(): when the file has more references than we
 * know of, count again. Otherwise (a child that closes 10,000 inherited
 * sockets) no table is walked.
 */
void sniffer_owner_close(struct file *file)
{
	struct sock *sk = owner_file_sock(file);
	struct sniffer_owner *owner;
	struct sniffer_proc *proc;
	struct sniffer_hold *hold;
	raw_spinlock_t *lock;
	unsigned long flags;
	u32 left = 0;
	long known;
	u64 cookie;

	if (!sk)
		return;
	cookie = atomic64_read(&sk->sk_cookie);
	if (!cookie)
		return;

	rcu_read_lock();
	owner = sniffer_owner_find(cookie);
	proc = owner ? sniffer_process_find(current) : NULL;
	if (!proc)
		goto out;

	if (file_count(file) > 1) {
		known = 0;
		lock = owner_lock(cookie);
		raw_spin_lock_irqsave(lock, flags);
		for (hold = owner->holds; hold; hold = hold->next) {
			known += hold->fds;
			if (hold->proc == proc && hold->fds)
				left = hold->fds - 1;
		}
		raw_spin_unlock_irqrestore(lock, flags);
		if (file_count(file) > known)
			left = owner_count_all_fds(file);
	}

	lock = owner_lock(cookie);
	raw_spin_lock_irqsave(lock, flags);
	/* the collector may have removed it meanwhile */
	if (hlist_unhashed(&owner->by_cookie)) {
		raw_spin_unlock_irqrestore(lock, flags);
		goto out;
	}
	/* the last reference: who shares this table has lost it, too */
	if (file_count(file) == 1) {
		owner_set_user(owner, proc);
		while ((hold = owner->holds)) {
			if (hold->proc == proc && hold->next)
				hold = hold->next;
			owner_drop_hold(owner, hold);
		}
	}
	hold = owner_hold_of(owner, proc);
	if (hold && left)
		hold->fds = left;
	else if (hold)
		owner_drop_hold(owner, hold);
	raw_spin_unlock_irqrestore(lock, flags);
out:
	rcu_read_unlock();
}

/**
 * sniffer_owner_close_state - a TCP socket goes to TCP_CLOSE, or out of it
 * @sk: full socket; any context
 * @oldstate: its state so far
 * @newstate: from now on
 *
 * One that ends out of a state which its own FIN led to may leave a TIME_WAIT
 * behind. Where the end of sockets is not told, this is taken for it.
 */
void sniffer_owner_close_state(struct sock *sk, int oldstate, int newstate)
{
	const int waiting = TCPF_FIN_WAIT2 | TCPF_CLOSING | TCPF_TIME_WAIT;
	u64 cookie = atomic64_read(&sk->sk_cookie);
	struct sniffer_owner *owner;

	if (!cookie)
		return;
	rcu_read_lock();
	owner = sniffer_owner_find(cookie);
	if (!owner || owner->via)
		goto out;
	if (newstate == TCP_CLOSE) {
		WRITE_ONCE(owner->waits, !!(1 << oldstate & waiting));
		if (!sniffer_probes_alive())
			WRITE_ONCE(owner->dead, jiffies | 1);
	} else {
		WRITE_ONCE(owner->waits, false);
		WRITE_ONCE(owner->dead, 0);
	}
out:
	rcu_read_unlock();
}

/**
 * sniffer_owner_free - a socket is being freed
 * @sk: full socket; any context
 */
void sniffer_owner_free(struct sock *sk)
{
	u64 cookie;
	struct sniffer_owner *owner;

	if (!sniffer_owner_wants(sk))
		return;
	cookie = atomic64_read(&sk->sk_cookie);
	if (!cookie)
		return;
	rcu_read_lock();
	owner = sniffer_owner_find(cookie);
	if (owner)
		WRITE_ONCE(owner->dead, jiffies | 1);
	rcu_read_unlock();
}

/**
 * sniffer_owner_seed - enter the sockets of all running processes
 *
 * Process context, after the probes: what they missed is found here.
 */
void sniffer_owner_seed(void)
{
	struct files_struct *files, *last = NULL;
	struct task_struct *process, *task;

	/* the first thread may have exited, others may have tables of their own */
	rcu_read_lock();
	for_each_process_thread(process, task) {
		if (task->flags & PF_KTHREAD)
			continue;
		task_lock(task);
		files = task->files;
		if (files && (files != last || task == process)) {
			last = files;
			/* keeps the files in the table, hence alive */
			spin_lock(&files->file_lock);
			owner_walk_files(files, task, SNIFFER_F_SEEDED);
			spin_unlock(&files->file_lock);
		}
		task_unlock(task);
	}
	rcu_read_unlock();
}

/**
 * sniffer_owner_next - walk the table for a dump
 * @bucket: where the walk stands; 0 at first
 * @index: the same within the bucket
 *
 * Return: the next entry or NULL at the end; under RCU.
 */
struct sniffer_owner *sniffer_owner_next(unsigned int *bucket, unsigned int *index)
{
	struct sniffer_owner *owner;
	unsigned int i;

	for (; *bucket < 1U << owner_bits; (*bucket)++, *index = 0) {
		i = 0;
		hlist_for_each_entry_rcu(owner, &owner_cookies[*bucket], by_cookie)
			if (i++ == *index) {
				(*index)++;
				return owner;
			}
	}
	return NULL;
}

/**
 * sniffer_owner_holders - list who holds a socket
 * @owner: entry, under RCU
 * @out: room for @max
 * @max: entries at most
 *
 * Return: number of holders listed.
 */
unsigned int sniffer_owner_holders(struct sniffer_owner *owner, struct sniffer_holder *out,
				   unsigned int max)
{
	raw_spinlock_t *lock = owner_lock(owner->cookie);
	struct sniffer_hold *hold;
	unsigned int count = 0;
	unsigned long flags;

	raw_spin_lock_irqsave(lock, flags);
	for (hold = owner->holds; hold && count < max; hold = hold->next, count++) {
		out[count].start_ns = hold->proc->start_ns;
		out[count].tgid = hold->proc->tgid;
		out[count].fds = hold->fds;
	}
	raw_spin_unlock_irqrestore(lock, flags);
	return count;
}

/**
 * sniffer_owner_count - sockets in the table now
 */
unsigned int sniffer_owner_count(void)
{
	return atomic_read(&owner_used);
}

/**
 * sniffer_owner_max - sockets that the table can take
 */
unsigned int sniffer_owner_max(void)
{
	return max_sockets;
}

/**
 * sniffer_owner_full - how often a socket, hold or process found no room
 */
u64 sniffer_owner_full(void)
{
	return atomic64_read(&owner_full);
}

static void owner_free_rcu(struct rcu_head *rcu)
{
	kmem_cache_free(owner_cache, container_of(rcu, struct sniffer_owner, rcu));
}

/* Under the cookie's lock, or when nobody else is left. */
static void owner_remove(struct sniffer_owner *owner)
{
	struct sniffer_hold *hold;

	hlist_del_init_rcu(&owner->by_cookie);
	owner_unindex_inode(owner);
	while ((hold = owner->holds)) {
		owner->holds = hold->next;
		sniffer_process_put(hold->proc);
		kmem_cache_free(owner_hold_cache, hold);
	}
	owner->nholders = 0;
	sniffer_process_put(rcu_dereference_protected(owner->user, true));
	RCU_INIT_POINTER(owner->user, NULL);
	atomic_dec(&owner_used);
	call_rcu(&owner->rcu, owner_free_rcu);
}

static void owner_collect(struct work_struct *work)
{
	bool tight = atomic_read(&owner_used) > max_sockets / 4 * 3 || sniffer_process_tight();
	bool blind = !sniffer_probes_alive();
	struct sniffer_owner *owner;
	struct hlist_node *next;
	unsigned long flags;
	unsigned int i;

	for (i = 0; i < 1U << owner_bits; i++) {
		raw_spinlock_t *lock = &owner_locks[i % OWNER_LOCKS];

		if (hlist_empty(&owner_cookies[i]))
			continue;
		raw_spin_lock_irqsave(lock, flags);
		hlist_for_each_entry_safe(owner, next, &owner_cookies[i], by_cookie) {
			unsigned long dead = READ_ONCE(owner->dead);
			unsigned long keep = OWNER_KEEP;

			if (owner->via || READ_ONCE(owner->waits))
				keep = tight ? OWNER_KEEP_MIN : OWNER_KEEP_WAIT;
			if (dead ? time_after(jiffies, dead + keep) :
			    blind ? time_after(jiffies, owner->seen + OWNER_KEEP_BLIND) :
				    !owner->nholders && !owner->via &&
				    time_after(jiffies, owner->seen + OWNER_KEEP_IDLE))
				owner_remove(owner);
		}
		raw_spin_unlock_irqrestore(lock, flags);
		cond_resched();
	}
	sniffer_process_collect();
	schedule_delayed_work(&owner_collector, HZ);
}

int sniffer_owner_init(void)
{
	unsigned int i;
	int err = -ENOMEM;

	if (max_sockets < 64 || max_sockets > 1 << 24) {
		pr_err("sniffer: max_sockets must be 64 to 16777216, not %u\n", max_sockets);
		return -EINVAL;
	}
	owner_bits = max_t(unsigned int, ilog2(roundup_pow_of_two(max_sockets)) - 1, 8);
	for (i = 0; i < OWNER_LOCKS; i++) {
		raw_spin_lock_init(&owner_locks[i]);
		raw_spin_lock_init(&owner_inode_locks[i]);
	}
	owner_cookies = kvcalloc(1U << owner_bits, sizeof(*owner_cookies), GFP_KERNEL);
	if (!owner_cookies)
		return err;
	owner_inodes = kvcalloc(1U << owner_bits, sizeof(*owner_inodes), GFP_KERNEL);
	if (!owner_inodes)
		goto free_cookies;
	owner_cache = kmem_cache_create("sniffer_owner", sizeof(struct sniffer_owner), 0,
					SLAB_HWCACHE_ALIGN, NULL);
	if (!owner_cache)
		goto free_inodes;
	owner_hold_cache = kmem_cache_create("sniffer_hold", sizeof(struct sniffer_hold), 0, 0,
					     NULL);
	if (!owner_hold_cache)
		goto free_cache;
	schedule_delayed_work(&owner_collector, HZ);
	return 0;

free_cache:
	kmem_cache_destroy(owner_cache);
free_inodes:
	kvfree(owner_inodes);
free_cookies:
	kvfree(owner_cookies);
	return err;
}

/* Hooks, probes and readers are gone. */
void sniffer_owner_exit(void)
{
	struct sniffer_owner *owner;
	struct hlist_node *next;
	unsigned int i;

	cancel_delayed_work_sync(&owner_collector);
	for (i = 0; i < 1U << owner_bits; i++)
		hlist_for_each_entry_safe(owner, next, &owner_cookies[i], by_cookie)
			owner_remove(owner);
	rcu_barrier();
	kmem_cache_destroy(owner_hold_cache);
	kmem_cache_destroy(owner_cache);
	kvfree(owner_inodes);
	kvfree(owner_cookies);
}
